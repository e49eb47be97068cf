//! Hub ids (`org/name[@revision]`) to local folders: the Hugging Face cache, and with the feature `hub` the hub itself.
//!
//! Cache layout: `models--org--name/{refs/REVISION, snapshots/COMMIT/FILE}`, shared with Python's huggingface_hub.

use super::adapter;
use super::safetensors::{INDEX, SINGLE, read_index};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// A model on the hub at a revision (branch, tag or commit).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HubId {
    name: String,
    revision: String,
}

impl HubId {
    /// Reads `org/name[@revision]`; None if the text does not look like one.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (org, model) = name.split_once('/')?;
        let plain = |part: &str| {
            part.bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
                && part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && !part.contains("..")
        };
        // A revision may have slashes (refs/pr/1): each part is held to the same rule.
        (plain(org) && plain(model) && revision.split('/').all(plain)).then(|| Self {
            name: name.to_owned(),
            revision: revision.to_owned(),
        })
    }
}

impl std::fmt::Display for HubId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.name, self.revision)
    }
}

/// Where models are fetched from and kept, as the environment says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    not(feature = "hub"),
    allow(dead_code, reason = "read by the download alone")
)]
pub(super) struct Hub {
    cache: PathBuf,
    endpoint: String,
    token: Option<String>,
    offline: bool,
}

impl Hub {
    /// Honours HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN (or the file that `hf auth login` wrote) and HF_HUB_OFFLINE.
    pub(super) fn from_env() -> Self {
        Self::from_variables(|key| std::env::var(key).ok().filter(|value| !value.is_empty()))
    }

    fn from_variables(get: impl Fn(&str) -> Option<String>) -> Self {
        let folder = |key: &str| get(key).map(PathBuf::from);
        let home = folder("HF_HOME").unwrap_or_else(|| {
            let cache = folder("XDG_CACHE_HOME")
                .or_else(|| Some(folder("HOME")?.join(".cache")))
                .unwrap_or_default();
            cache.join("huggingface")
        });
        let token_file = folder("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let read_token = || std::fs::read_to_string(token_file).ok();
        Self {
            cache: folder("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
            endpoint: get("HF_ENDPOINT")
                .unwrap_or_else(|| "https://huggingface.co".to_owned())
                .trim_end_matches('/')
                .to_owned(),
            token: get("HF_TOKEN")
                .or_else(read_token)
                .map(|token| token.trim().to_owned())
                .filter(|token| !token.is_empty()),
            offline: get("HF_HUB_OFFLINE").is_some_and(|value| {
                ["1", "true", "yes", "on"].contains(&value.to_lowercase().as_str())
            }),
        }
    }

    /// The folder of a model's files: from the cache when offline, when the revision is a cached
    /// commit, or when the hub does not answer; else brought up to date from the hub.
    pub(super) fn locate(&self, id: &HubId) -> Result<PathBuf> {
        let cached = self.snapshot(id).filter(|folder| is_whole(folder));
        if self.offline {
            return cached.with_context(|| {
                format!(
                    "{id}: no such folder or file, not in the Hugging Face cache ({}), and HF_HUB_OFFLINE forbids fetching it",
                    self.cache.display()
                )
            });
        }
        self.fetch(id, cached)
    }

    /// A file of a data set `org/name`, at its main branch: from the cache, else from the hub.
    pub(super) fn dataset_file(&self, name: &str, file: &str) -> Result<PathBuf> {
        let repository = format!("datasets--{}", name.replace('/', "--"));
        let repository = self.cache.join(repository);
        let commit = std::fs::read_to_string(repository.join("refs/main")).unwrap_or_default();
        let cached = repository.join("snapshots").join(commit.trim()).join(file);
        if is_commit(commit.trim()) && cached.is_file() {
            return Ok(cached);
        }
        if self.offline {
            bail!(
                "data set {name}: {file} is not in the Hugging Face cache ({}), and HF_HUB_OFFLINE forbids fetching it",
                self.cache.display()
            );
        }
        self.fetch_dataset_file(name, file)
    }

    #[cfg(not(feature = "hub"))]
    fn fetch_dataset_file(&self, name: &str, file: &str) -> Result<PathBuf> {
        bail!(
            "data set {name}: {file} is not in the Hugging Face cache ({}); this program was built without the hub: build it with `--features hub` to fetch it",
            self.cache.display()
        )
    }

    #[cfg(feature = "hub")]
    fn api(&self) -> Result<hf_hub::api::sync::Api> {
        let cache = hf_hub::Cache::new(self.cache.clone());
        let builder = hf_hub::api::sync::ApiBuilder::from_cache(cache)
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_retries(3);
        Ok(builder.build()?)
    }

    #[cfg(feature = "hub")]
    fn fetch_dataset_file(&self, name: &str, file: &str) -> Result<PathBuf> {
        use hf_hub::{Repo, RepoType};
        let repository = self
            .api()?
            .repo(Repo::new(name.to_owned(), RepoType::Dataset));
        repository
            .get(file)
            .with_context(|| format!("data set {name}: {} does not give {file}", self.endpoint))
    }

    fn repository(&self, id: &HubId) -> PathBuf {
        self.cache
            .join(format!("models--{}", id.name.replace('/', "--")))
    }

    fn snapshot(&self, id: &HubId) -> Option<PathBuf> {
        let repository = self.repository(id);
        let commit = match is_commit(&id.revision) {
            true => id.revision.clone(),
            false => std::fs::read_to_string(repository.join("refs").join(&id.revision)).ok()?,
        };
        let commit = commit.trim();
        let folder = repository.join("snapshots").join(commit);
        (is_commit(commit) && folder.is_dir()).then_some(folder)
    }

    #[cfg(not(feature = "hub"))]
    fn fetch(&self, id: &HubId, cached: Option<PathBuf>) -> Result<PathBuf> {
        cached.with_context(|| {
            format!(
                "{id}: no such folder or file, nor in the Hugging Face cache ({}); this program was built without the hub: build it with `--features hub` to fetch models",
                self.cache.display()
            )
        })
    }

    #[cfg(feature = "hub")]
    fn fetch(&self, id: &HubId, cached: Option<PathBuf>) -> Result<PathBuf> {
        use hf_hub::{Cache, Repo, RepoType};
        if let Some(folder) = cached.as_ref().filter(|_| is_commit(&id.revision)) {
            return Ok(folder.clone());
        }
        let at = |revision: &str| {
            Repo::with_revision(id.name.clone(), RepoType::Model, revision.to_owned())
        };
        let cache = Cache::new(self.cache.clone());
        let api = self.api()?;
        let info = match (api.repo(at(&id.revision)).info(), cached) {
            (Ok(info), _) => info,
            (Err(_), Some(folder)) => return Ok(folder),
            (Err(error), None) => {
                return Err(error).with_context(|| {
                    format!(
                        "{id}: no such folder or file, and {} does not give it (private and gated models need HF_TOKEN)",
                        self.endpoint
                    )
                });
            }
        };
        anyhow::ensure!(
            is_commit(&info.sha),
            "{id}: the hub named the commit {:?}",
            info.sha
        );
        let folder = self.repository(id).join("snapshots").join(&info.sha);
        // Every file is fetched at the commit, so that a push meanwhile cannot mix two versions.
        let repository = api.repo(at(&info.sha));
        let fetch = |file: &str| -> Result<()> {
            if !folder.join(file).exists() {
                repository
                    .download(file)
                    .with_context(|| format!("{id}: {file}"))?;
            }
            Ok(())
        };
        let there: Vec<_> = info.siblings.iter().map(|s| s.rfilename.as_str()).collect();
        let wanted = [SMALL_FILES, &[weights_file(&there, id)?]].concat();
        for file in wanted.iter().filter(|file| there.contains(file)) {
            fetch(file)?;
        }
        if wanted.contains(&INDEX) {
            for (_, shard) in read_index(&folder.join(INDEX))? {
                fetch(&shard)?;
            }
        }
        cache.repo(at(&id.revision)).create_ref(&info.sha)?;
        Ok(folder)
    }
}

/// What a model's folder may hold beside its weights that any of the programs reads.
#[cfg(feature = "hub")]
const SMALL_FILES: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    adapter::CONFIG,
];

#[cfg(feature = "hub")]
fn weights_file<'a>(there: &[&'a str], id: &HubId) -> Result<&'a str> {
    let known = [SINGLE, INDEX, adapter::WEIGHTS];
    let found = known
        .iter()
        .find_map(|file| there.iter().find(|name| *name == file));
    found.copied().with_context(|| {
        format!(
            "{id}: holds no {}; a GGUF must be downloaded and given as a file, pickled weights (.bin) are never opened",
            known.join(", ")
        )
    })
}

/// A Git commit's 40 hex digits.
fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether a snapshot has all it takes to be opened; a download that was interrupted has not.
fn is_whole(folder: &Path) -> bool {
    let has = |file: &str| folder.join(file).is_file();
    let shards = || {
        read_index(&folder.join(INDEX)).is_ok_and(|index| index.iter().all(|(_, file)| has(file)))
    };
    (has("config.json") && (has(SINGLE) || shards()))
        || (has(adapter::CONFIG) && has(adapter::WEIGHTS))
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{checkpoint, open};
    use super::*;
    use std::fs;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn hub(cache: &Path, endpoint: &str, offline: bool) -> Hub {
        Hub {
            cache: cache.to_owned(),
            endpoint: endpoint.to_owned(),
            token: Some("hf_secret".to_owned()),
            offline,
        }
    }

    fn id(text: &str) -> HubId {
        HubId::parse(text).unwrap()
    }

    #[test]
    fn ids_are_held_to_plain_names() {
        let parsed = id("HuggingFaceTB/SmolLM2-135M_x.y@refs/pr/1");
        assert_eq!(
            parsed.to_string(),
            "HuggingFaceTB/SmolLM2-135M_x.y@refs/pr/1"
        );
        assert_eq!(id("a/b").revision, "main");
        for bad in [
            "model", "/a/b", "./a/b", "../a", "a/..", "a/b/c", "a/b..c", "a b/c", "a/b@",
            "a/b@../x", "a/b@/x", "a/b@x//y", "a/b@x y", "a/b?c", "a/b#c", "a\\b/c", "a/.b", "/b",
            "a/",
        ] {
            assert_eq!(HubId::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_environment_decides_as_for_python() {
        let of = |pairs: &[(&str, &str)]| {
            let pairs = pairs.to_vec();
            Hub::from_variables(move |key| {
                let found = pairs.iter().find(|(k, _)| *k == key);
                found.map(|(_, value)| (*value).to_owned())
            })
        };
        let plain = of(&[("HOME", "/nobody")]);
        assert_eq!(plain.cache, Path::new("/nobody/.cache/huggingface/hub"));
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert_eq!((plain.token, plain.offline), (None, false));
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let home = home.path().to_str().unwrap();
        let set = of(&[
            ("HF_HOME", home),
            ("HF_ENDPOINT", "http://mirror/"),
            ("HF_HUB_OFFLINE", "True"),
        ]);
        assert_eq!(set.cache, Path::new(home).join("hub"));
        assert_eq!(set.endpoint, "http://mirror");
        assert_eq!((set.token.as_deref(), set.offline), (Some("hf_file"), true));
        let over = of(&[
            ("HF_HOME", home),
            ("HF_HUB_CACHE", "/c"),
            ("HF_TOKEN", "hf_env"),
            ("HF_HUB_OFFLINE", "0"),
        ]);
        assert_eq!(over.cache, Path::new("/c"));
        assert_eq!(
            (over.token.as_deref(), over.offline),
            (Some("hf_env"), false)
        );
        assert_eq!(
            of(&[("XDG_CACHE_HOME", "/x")]).cache,
            Path::new("/x/huggingface/hub")
        );
    }

    /// A cache as Python's huggingface_hub leaves it, holding a tiny checkpoint.
    fn cache() -> (tempfile::TempDir, PathBuf) {
        let (model, ..) = checkpoint("llama");
        let cache = tempfile::tempdir().unwrap();
        let repository = cache.path().join("models--org--name");
        let snapshot = repository.join("snapshots").join(COMMIT);
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(repository.join("refs")).unwrap();
        fs::write(repository.join("refs/main"), COMMIT).unwrap();
        for file in ["config.json", SINGLE] {
            fs::copy(model.path().join(file), snapshot.join(file)).unwrap();
        }
        (cache, snapshot)
    }

    #[test]
    fn a_cached_model_opens_offline_by_branch_and_by_commit() {
        let (cache, snapshot) = cache();
        let hub = hub(cache.path(), "", true);
        for text in ["org/name", "org/name@main", &format!("org/name@{COMMIT}")] {
            assert_eq!(hub.locate(&id(text)).unwrap(), snapshot);
        }
        open(&snapshot).unwrap();
        let line = hub.locate(&id("org/name@v2")).unwrap_err().to_string();
        assert!(
            line.contains("org/name@v2") && line.contains("HF_HUB_OFFLINE"),
            "{line}"
        );
    }

    #[test]
    fn a_missing_file_of_a_data_set_is_named() {
        let cache = tempfile::tempdir().unwrap();
        let hub = hub(cache.path(), "", true);
        let line = hub
            .dataset_file("org/name", "d.csv")
            .unwrap_err()
            .to_string();
        assert!(line.contains("org/name: d.csv is not in"), "{line}");
        assert!(line.contains("HF_HUB_OFFLINE"), "{line}");
    }

    #[test]
    fn a_half_downloaded_snapshot_or_a_strange_ref_is_not_used() {
        let (cache, snapshot) = cache();
        let hub = hub(cache.path(), "", true);
        let refs = cache.path().join("models--org--name/refs/main");
        fs::write(&refs, "../../../elsewhere").unwrap();
        assert!(hub.locate(&id("org/name")).is_err());
        fs::write(&refs, COMMIT).unwrap();
        fs::remove_file(snapshot.join(SINGLE)).unwrap();
        assert!(hub.locate(&id("org/name")).is_err());
        let index = r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
        fs::write(snapshot.join(INDEX), index).unwrap();
        fs::write(snapshot.join("1.safetensors"), "").unwrap();
        assert!(hub.locate(&id("org/name")).is_err());
        fs::write(snapshot.join("2.safetensors"), "").unwrap();
        assert!(hub.locate(&id("org/name")).is_ok());
    }

    #[cfg(not(feature = "hub"))]
    #[test]
    fn without_the_feature_the_cache_still_serves_and_the_rest_says_how_to_build() {
        let (cache, snapshot) = cache();
        let hub = hub(cache.path(), "", false);
        assert_eq!(hub.locate(&id("org/name")).unwrap(), snapshot);
        let line = hub.locate(&id("org/other")).unwrap_err().to_string();
        assert!(line.contains("--features hub"), "{line}");
    }

    #[cfg(feature = "hub")]
    mod online {
        use super::*;
        use crate::weights::fixtures::{assert_holds, borrowed};
        use std::collections::HashMap;
        use std::io::{BufRead, BufReader, Write};
        use std::net::{TcpListener, TcpStream};
        use std::sync::{Arc, Mutex};

        /// A hub on the loopback that holds one repository, `org/name`, and remembers its requests.
        struct Stub {
            endpoint: String,
            requests: Arc<Mutex<Vec<String>>>,
        }

        impl Stub {
            fn serve(sha: &str, files: HashMap<String, Vec<u8>>) -> Self {
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                let endpoint = format!("http://{}", listener.local_addr().unwrap());
                let requests = Arc::new(Mutex::new(Vec::new()));
                let (log, sha) = (requests.clone(), sha.to_owned());
                std::thread::spawn(move || {
                    for stream in listener.incoming().flatten() {
                        answer(stream, &sha, &files, &log).ok();
                    }
                });
                Self { endpoint, requests }
            }

            fn taken(&self) -> Vec<String> {
                std::mem::take(&mut self.requests.lock().unwrap())
            }
        }

        fn answer(
            mut stream: TcpStream,
            sha: &str,
            files: &HashMap<String, Vec<u8>>,
            log: &Mutex<Vec<String>>,
        ) -> std::io::Result<()> {
            let mut reader = BufReader::new(stream.try_clone()?);
            let (mut request, mut start, mut token) = (String::new(), 0, false);
            reader.read_line(&mut request)?;
            loop {
                let mut line = String::new();
                reader.read_line(&mut line)?;
                let line = line.trim().to_lowercase();
                if line.is_empty() {
                    break;
                }
                if let Some(range) = line.strip_prefix("range: bytes=") {
                    start = range.split('-').next().unwrap().parse().unwrap();
                }
                token |= line == "authorization: bearer hf_secret";
            }
            let path = request.split(' ').nth(1).unwrap_or("").to_owned();
            log.lock().unwrap().push(path.clone());
            // Large files are redirected, as the hub does to its storage.
            let stored = path.strip_prefix("/storage/");
            let file = path
                .strip_prefix(&format!("/org/name/resolve/{sha}/"))
                .or_else(|| path.strip_prefix("/datasets/org/name/resolve/main/"));
            let redirected = file.filter(|file| file.ends_with(".safetensors"));
            let (status, headers, body) = if !token {
                ("401 Unauthorized", String::new(), Vec::new())
            } else if path == "/api/models/org/name/revision/main" {
                let siblings: Vec<_> = files
                    .keys()
                    .map(|name| serde_json::json!({"rfilename": name}))
                    .collect();
                let info = serde_json::json!({"sha": sha, "siblings": siblings});
                ("200 OK", String::new(), info.to_string().into_bytes())
            } else if let Some(file) = redirected {
                let host = stream.local_addr()?;
                let headers = format!(
                    "location: http://{host}/storage/{file}\r\nx-linked-etag: \"{file}\"\r\nx-repo-commit: {sha}\r\n"
                );
                ("302 Found", headers, Vec::new())
            } else if let Some(bytes) = stored.or(file).and_then(|file| files.get(file)) {
                let headers = format!(
                    "etag: \"{}\"\r\nx-repo-commit: {sha}\r\ncontent-range: bytes {start}-{}/{}\r\n",
                    blake3::hash(bytes).to_hex(),
                    bytes.len() - 1,
                    bytes.len()
                );
                ("206 Partial Content", headers, bytes[start..].to_vec())
            } else {
                ("404 Not Found", String::new(), Vec::new())
            };
            write!(
                stream,
                "HTTP/1.1 {status}\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n",
                body.len()
            )?;
            stream.write_all(&body)
        }

        fn files_of(folder: &Path) -> HashMap<String, Vec<u8>> {
            fs::read_dir(folder)
                .unwrap()
                .flatten()
                .map(|entry| {
                    let name = entry.file_name().into_string().unwrap();
                    (name, fs::read(entry.path()).unwrap())
                })
                .collect()
        }

        #[test]
        fn a_model_is_fetched_once_and_then_served_from_the_cache() {
            let (model, _, tensors) = checkpoint("llama");
            fs::write(model.path().join("README.md"), "not needed").unwrap();
            let stub = Stub::serve(COMMIT, files_of(model.path()));
            let cache = tempfile::tempdir().unwrap();
            let hub = hub(cache.path(), &stub.endpoint, false);
            let folder = hub.locate(&id("org/name")).unwrap();
            assert_holds(&open(&folder).unwrap(), &tensors);
            assert!(!folder.join("README.md").exists());
            let requests = stub.taken();
            assert!(
                requests.iter().any(|path| path.ends_with(SINGLE)),
                "{requests:?}"
            );
            let main = cache.path().join("models--org--name/refs/main");
            assert_eq!(fs::read_to_string(main).unwrap(), COMMIT);

            assert_eq!(hub.locate(&id("org/name")).unwrap(), folder);
            assert_eq!(stub.taken(), ["/api/models/org/name/revision/main"]);
            let pinned = id(&format!("org/name@{COMMIT}"));
            assert_eq!(hub.locate(&pinned).unwrap(), folder);
            assert_eq!(stub.taken().len(), 0, "a cached commit needs no network");
            let gone = super::hub(cache.path(), "http://127.0.0.1:9", false);
            assert_eq!(gone.locate(&id("org/name")).unwrap(), folder);
        }

        #[test]
        fn a_file_of_a_data_set_is_fetched_once() {
            let files = HashMap::from([("d.csv".to_owned(), b"index\n0\n".to_vec())]);
            let stub = Stub::serve(COMMIT, files);
            let cache = tempfile::tempdir().unwrap();
            let hub = hub(cache.path(), &stub.endpoint, false);
            let file = hub.dataset_file("org/name", "d.csv").unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), "index\n0\n");
            assert!(!stub.taken().is_empty());
            assert_eq!(hub.dataset_file("org/name", "d.csv").unwrap(), file);
            assert_eq!(stub.taken().len(), 0, "the cache has it");
            let offline = super::hub(cache.path(), "", true);
            assert_eq!(offline.dataset_file("org/name", "d.csv").unwrap(), file);
            let line = format!("{:#}", hub.dataset_file("org/name", "e.csv").unwrap_err());
            assert!(
                line.contains("org/name") && line.contains("e.csv"),
                "{line}"
            );
        }

        #[test]
        fn shards_are_fetched_as_the_index_names_them() {
            let (_, config, tensors) = checkpoint("llama");
            let model = tempfile::tempdir().unwrap();
            crate::weights::save::save_sharded(
                model.path(),
                &config,
                None,
                borrowed(&tensors),
                9000,
            )
            .unwrap();
            let stub = Stub::serve(COMMIT, files_of(model.path()));
            let cache = tempfile::tempdir().unwrap();
            let hub = hub(cache.path(), &stub.endpoint, false);
            let folder = hub.locate(&id("org/name")).unwrap();
            assert_holds(&open(&folder).unwrap(), &tensors);
        }

        #[test]
        fn what_the_hub_lacks_or_answers_wrongly_is_one_clear_line() {
            let cache = tempfile::tempdir().unwrap();
            let line = |sha: &str, files: HashMap<String, Vec<u8>>, text: &str| {
                let stub = Stub::serve(sha, files);
                let error = hub(cache.path(), &stub.endpoint, false).locate(&id(text));
                format!("{:#}", error.unwrap_err())
            };
            let pickled = HashMap::from([("pytorch_model.bin".to_owned(), vec![1])]);
            let missing = line(COMMIT, pickled.clone(), "org/other");
            assert!(
                missing.contains("org/other@main") && missing.contains("404"),
                "{missing}"
            );
            let refused = line(COMMIT, pickled.clone(), "org/name");
            assert!(refused.contains("holds no model.safetensors"), "{refused}");
            let strange = line("../../escape", pickled, "org/name");
            assert!(strange.contains("named the commit"), "{strange}");
        }
    }
}
