//! Compiles the device's kernels (`cuda/*.cu`), where a feature asks for them: with nvcc for GPUs, as C++ for the
//! emulated device of the tests. Without either feature there is nothing to do.

fn main() {
    println!("cargo:rerun-if-changed=cuda");
    #[cfg(feature = "cuda")]
    for_gpus::compile();
    #[cfg(feature = "cuda-emulated")]
    emulated::compile();
}

/// The sources of the kernels.
#[cfg(any(feature = "cuda", feature = "cuda-emulated"))]
fn sources() -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir("cuda").expect("the folder of the kernels");
    let mut sources: Vec<_> = entries
        .map(|entry| entry.expect("an entry of the folder").path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    sources.sort();
    sources
}

#[cfg(feature = "cuda")]
mod for_gpus {
    use std::env;
    use std::fmt::Write;
    use std::path::{Path, PathBuf};
    use std::process::{Command, exit};
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    /// Machine code for Ampere and Ada (8.x) and Hopper (9.0); what comes later compiles the PTX when it loads it.
    const TARGETS: [&str; 2] = [
        "arch=compute_80,code=sm_80",
        "arch=compute_90,code=[sm_90,compute_90]",
    ];

    /// Makes one image of each source, and `images.rs`, which holds them.
    pub fn compile() {
        for name in ["CUDA_HOME", "CUDA_PATH"] {
            println!("cargo:rerun-if-env-changed={name}");
        }
        let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it"));
        let (home, sources) = (toolkit(), super::sources());
        let images: Vec<PathBuf> = (sources.iter())
            .map(|source| {
                out.join(source.file_name().expect("a file"))
                    .with_extension("fatbin")
            })
            .collect();
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
                scope.spawn(|| {
                    loop {
                        let i = next.fetch_add(1, Relaxed);
                        match sources.get(i) {
                            Some(source) => nvcc(&home, source, &images[i]),
                            None => break,
                        }
                    }
                });
            }
        });
        let mut list = String::from("[\n");
        for image in &images {
            writeln!(list, "    &Aligned(*include_bytes!({image:?})),").expect("memory");
        }
        list.push(']');
        std::fs::write(out.join("images.rs"), list).expect("cargo's folder can be written");
    }

    fn nvcc(home: &Path, source: &Path, image: &Path) {
        let mut command = Command::new(home.join("bin/nvcc"));
        command
            .env("CUDA_HOME", home)
            .args(["-fatbin", "-std=c++17", "-O3", "-o"]);
        command.arg(image).arg(source);
        for target in TARGETS {
            command.args(["-gencode", target]);
        }
        match command.status() {
            Ok(status) if status.success() => {}
            Ok(_) => fail(&format!("nvcc refuses {}", source.display())),
            Err(error) => fail(&format!(
                "{} does not run: {error}",
                home.join("bin/nvcc").display()
            )),
        }
    }

    /// The folder with `bin/nvcc`: where the environment says, where `just cuda-toolkit` puts it, or the usual place.
    fn toolkit() -> PathBuf {
        let var = |name: &str| {
            env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        let cache = var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|home| home.join(".cache")));
        let candidates = [
            var("CUDA_HOME"),
            var("CUDA_PATH"),
            cache.map(|cache| cache.join("dice/cuda")),
            Some(PathBuf::from("/usr/local/cuda")),
        ];
        let found = candidates
            .into_iter()
            .flatten()
            .find(|home| home.join("bin/nvcc").is_file());
        found.unwrap_or_else(|| {
            fail("feature `cuda` needs nvcc: `just cuda-toolkit` fetches it (no GPU, no root), or CUDA_HOME says where it is")
        })
    }

    fn fail(message: &str) -> ! {
        println!("cargo::error={message}");
        exit(1)
    }
}

#[cfg(feature = "cuda-emulated")]
mod emulated {
    pub fn compile() {
        let mut build = cc::Build::new();
        // `just test-sanitized`. AddressSanitizer wants to come before all other libraries.
        println!("cargo:rerun-if-env-changed=DICE_SANITIZE");
        if std::env::var_os("DICE_SANITIZE").is_some() {
            build.flag("-fsanitize=address,undefined");
            build.flag("-fno-sanitize-recover=all");
            println!("cargo:rustc-link-lib=dylib=asan");
            println!("cargo:rustc-link-lib=dylib=ubsan");
        }
        build
            .cpp(true)
            .std("c++17")
            .flag("-xc++")
            // Vectors are read through pointers of their own type, and products are not to be fused as this CPU likes.
            .flag("-fno-strict-aliasing")
            .flag("-ffp-contract=off")
            .flag("-Wno-unknown-pragmas")
            .files(super::sources())
            .file("cuda/emulate/emulate.cpp")
            .compile("emulated_kernels");
    }
}
