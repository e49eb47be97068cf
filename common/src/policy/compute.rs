//! Where a tool computes, in which number format and in how much memory, as its flags and the machine have it.

use crate::budget;
use crate::cuda;
use crate::kernels::decoding::Format;
use crate::kernels::gemm::Precision;
use crate::kernels::isa::Isa;
use crate::program;
use anyhow::{Context, Result, bail};

/// Where and in which number format a tool computes; `#[command(flatten)]` it.
#[derive(clap::Args, Clone, Debug)]
pub struct Compute {
    /// Where to compute: auto (the first GPU that can be used, else the CPU), cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", value_parser = device)]
    pub device: String,

    /// Number format of the matrix products (sums, losses and saved weights are float32 always)
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,

    /// Most memory to use (8G, 512M): batches are made to fit, and a row that does not fit even alone is left out and
    /// named. Without it, three quarters of what the machine has left when the models are loaded. On a GPU it limits the
    /// GPU's memory, models included (without it: all that is free)
    #[arg(long, value_name = "SIZE", value_parser = budget::size)]
    pub memory_budget: Option<usize>,

    /// What to do with a row or a step whose numbers are not finite: fail, or leave it out and name it
    #[arg(long, value_enum, value_name = "stop|skip", default_value_t = OnNan::Stop)]
    pub on_nan: OnNan,
}

/// What is done about log-probs, losses and gradients that are NaN or infinite. They are never averaged into anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnNan {
    /// End with an error that names the row or the step
    Stop,
    /// Leave the row or the step out, name it and count it
    Skip,
}

/// A choice of number format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Dtype {
    /// For sampling bf16 where the machine is fast at it, else f32; for scoring and training f32. Said on stderr
    Auto,
    /// Float32
    F32,
    /// Bfloat16 operands, float32 sums
    Bf16,
    /// Half-precision operands, float32 sums: of bf16's size, eight times as fine; for scoring on a GPU alone
    #[value(alias = "fp16")]
    F16,
}

/// What is computed, which decides over number formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// `--dtype auto` is for speed: bfloat16 changes a draw now and then but not the distribution to speak of.
    Sampling,
    /// `--dtype auto` is for exact log-probs: a reward is a small difference of two of them.
    Scoring,
    /// `--dtype auto` is exact, too.
    Training,
}

/// A choice of number format for the keys and values of prompts and responses at work. (The name is vLLM's.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum KvCacheDtype {
    /// int8 where --dtype auto means bf16 on a CPU; else as --dtype says
    Auto,
    /// Integers of 8 bits, with a scale for each key and value (on a CPU)
    Int8,
}

impl KvCacheDtype {
    /// Settles the format. Half the bytes are what long responses wait for; and what 8 bits change of log-probs is not much
    /// more than what bfloat16 does.
    ///
    /// # Errors
    /// 8 bits on a GPU.
    pub fn format(self, compute: &Compute, place: &Place) -> Result<Format> {
        let fast = compute.dtype == Dtype::Auto && place.precision == cuda::Precision::Bf16;
        Ok(match (self, &place.gpu) {
            (Self::Int8, Some(_)) => bail!("--kv-cache-dtype int8 is for a CPU (--device cpu)"),
            (Self::Int8, None) => Format::Int8,
            (Self::Auto, None) if fast => Format::Int8,
            (Self::Auto, _) => Format::Float(place.full_range_precision()),
        })
    }
}

/// The name of the formats that something was sampled in: as `--dtype` takes it, where caches are in the same.
pub fn sampling_dtype(dtype: &str, int8_cache: bool) -> String {
    match int8_cache {
        false => dtype.to_owned(),
        true => format!("{dtype}+kv-int8"),
    }
}

fn device(text: &str) -> Result<String, String> {
    let number = text
        .strip_prefix("cuda:")
        .is_some_and(|n| n.parse::<usize>().is_ok());
    if number || ["auto", "cpu", "cuda"].contains(&text) {
        Ok(text.to_owned())
    } else {
        Err("expected auto, cpu, cuda or cuda:N".to_owned())
    }
}

impl Compute {
    /// The number format that was asked for by name, as settings of a run have it; none where it is left to the machine.
    pub fn named_dtype(&self) -> Option<&'static str> {
        let named = match self.dtype {
            Dtype::Auto => return None,
            Dtype::F32 => cuda::Precision::F32,
            Dtype::Bf16 => cuda::Precision::Bf16,
            Dtype::F16 => cuda::Precision::F16,
        };
        Some(named.name())
    }

    /// Settles where and in which number format to compute. `auto` takes the first GPU where this build can use one.
    ///
    /// # Errors
    /// A GPU that was asked for and cannot be used; a format that is not for the stage.
    pub fn place(&self, stage: Stage) -> Result<Place> {
        let gpu = match self.device.as_str() {
            "cpu" => None,
            "auto" if cuda::count() == 0 => None,
            "auto" => match cuda::open(0) {
                Ok(gpu) => Some(gpu),
                Err(err) => {
                    program::say(format_args!("the GPU is left alone: {err:#}"));
                    None
                }
            },
            named => {
                let number = named.strip_prefix("cuda:").map_or(Ok(0), str::parse)?;
                let gpu = cuda::open(number).with_context(|| format!("--device {named}"))?;
                Some(gpu)
            }
        };
        if let (Some(gpu), Some(budget)) = (&gpu, self.memory_budget) {
            gpu.limit_memory(budget);
        }
        let precision = self.precision(stage, gpu.is_some())?;
        if gpu.is_some() && self.dtype == Dtype::Auto && precision == cuda::Precision::F32 {
            let finer = match stage {
                Stage::Scoring => "; --dtype f16 is of that size, and finer",
                Stage::Sampling | Stage::Training => "",
            };
            program::say(format_args!(
                "float32 is exact, and slow on a GPU: --dtype bf16 multiplies some 15 times as fast{finer}"
            ));
        }
        Ok(Place {
            precision,
            gpu,
            budget: self.memory_budget,
        })
    }

    fn precision(&self, stage: Stage, on_gpu: bool) -> Result<cuda::Precision> {
        use cuda::Precision::{Bf16, F16, F32};
        let fast_bf16 = on_gpu || Isa::current() == Isa::Avx512 { bf16: true };
        Ok(match (self.dtype, stage) {
            (Dtype::Auto, Stage::Sampling) if fast_bf16 => Bf16,
            (Dtype::F32 | Dtype::Auto, _) => F32,
            (Dtype::Bf16, _) => Bf16,
            (Dtype::F16, Stage::Scoring) if on_gpu => F16,
            (Dtype::F16, _) => bail!("--dtype f16 is for scoring on a GPU: use f32 or bf16 here"),
        })
    }
}

/// Where and in which number format a tool computes.
#[derive(Clone)]
pub struct Place {
    /// The GPU; none is the CPU.
    pub gpu: Option<cuda::Device>,
    /// The format of the matrix products' operands.
    pub precision: cuda::Precision,
    /// What the user lets a CPU's computation take, bytes; a GPU knows it by itself.
    pub budget: Option<usize>,
}

impl Place {
    /// The name of the number format, as `--dtype` takes it.
    pub fn dtype(&self) -> &'static str {
        self.precision.name()
    }

    /// The format where there is no half precision: on a CPU, in sampling and in training.
    pub fn full_range_precision(&self) -> Precision {
        match self.precision {
            cuda::Precision::F32 => Precision::F32,
            cuda::Precision::Bf16 => Precision::Bf16,
            cuda::Precision::F16 => unreachable!("`Compute::place` refuses it there"),
        }
    }
}

/// For people: "f32", "bf16 on NVIDIA H200".
impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.dtype())?;
        match &self.gpu {
            Some(gpu) => write!(f, " on {}", gpu.name()),
            None => Ok(()),
        }
    }
}
