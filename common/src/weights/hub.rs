//! Hub ids (`org/name[@revision]`) to local folders: the Hugging Face cache, and with the feature `hub` the hub itself.
//!
//! Cache layout: `models--org--name/{refs/REVISION, snapshots/COMMIT/FILE}`, shared with Python's huggingface_hub.

use super::adapter;
use super::safetensors::{INDEX, SINGLE, read_index};
use anyhow::{Context, Result};
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
                    "{id}: not in the cache ({}), and HF_HUB_OFFLINE forbids fetching it",
                    self.cache.display()
                )
            });
        }
        self.fetch(id, cached)
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
        use hf_hub::{Cache, Repo, RepoType, api::sync::ApiBuilder};
        if let Some(folder) = cached.as_ref().filter(|_| is_commit(&id.revision)) {
            return Ok(folder.clone());
        }
        let at = |revision: &str| {
            Repo::with_revision(id.name.clone(), RepoType::Model, revision.to_owned())
        };
        let cache = Cache::new(self.cache.clone());
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_retries(3)
            .build()?;
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
