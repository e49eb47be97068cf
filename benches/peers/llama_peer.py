"""llama.cpp with all sequences in parallel, through its C interface: prompts once per group, a sampler for each sequence."""

import ctypes
import os
import time
from pathlib import Path

import llama_cpp as llama

from workload import K

TOKENS = 48  # of each response: it is slow, and longer ones are slower still

QUIET = llama.llama_log_callback(lambda *_: None)
llama.llama_log_set(QUIET, ctypes.c_void_p(0))

FORMATS = {"f16": llama.LLAMA_FTYPE_MOSTLY_F16, "bf16": llama.LLAMA_FTYPE_MOSTLY_BF16, "q8_0": llama.LLAMA_FTYPE_MOSTLY_Q8_0}


def convert(gguf, form, folder):
    """The model in another number format, made by llama.cpp's own quantiser."""
    path = Path(folder) / f"{form}.gguf"
    if not path.exists():
        params = llama.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.pure, params.nthread = FORMATS[form], True, True, os.cpu_count()
        failed = llama.llama_model_quantize(str(gguf).encode(), str(path).encode(), params)
        assert not failed, f"llama.cpp could not write {form}"
    return path


class Llama:
    def __init__(self, path, sequences):
        self.sequences = sequences
        self.model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * 256, sequences
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = os.cpu_count()
        params.kv_unified = False
        self.context = llama.llama_init_from_model(self.model, params)
        assert self.context, "llama.cpp has no context"
        self.batch = llama.llama_batch_init(512, 0, 1)
        self.samplers = [self.sampler(seed) for seed in range(sequences)]

    def sampler(self, seed):
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_temp(0.9))
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_dist(seed))
        return chain

    def decode(self, tokens):
        """One pass over (token, position, sequence, wants logits)."""
        self.batch.n_tokens = len(tokens)
        for i, (token, position, sequence, logits) in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i] = token, position
            self.batch.n_seq_id[i], self.batch.seq_id[i][0], self.batch.logits[i] = 1, sequence, logits
        assert llama.llama_decode(self.context, self.batch) == 0, "llama.cpp could not decode"

    def generate(self, prompts):
        """Seconds of TOKENS tokens for K sequences of each prompt (ids), whatever they say."""
        start = time.perf_counter()
        memory = llama.llama_get_memory(self.context)
        groups = self.sequences // K
        for at in range(0, len(prompts), groups):
            llama.llama_memory_clear(memory, True)
            last, position = {}, {}
            for g, prompt in enumerate(prompts[at : at + groups]):
                self.decode([(t, i, g * K, i + 1 == len(prompt)) for i, t in enumerate(prompt)])
                for s in range(g * K, (g + 1) * K):
                    if s > g * K:
                        llama.llama_memory_seq_cp(memory, g * K, s, -1, -1)
                    last[s] = llama.llama_sampler_sample(self.samplers[s], self.context, -1)
                    position[s] = len(prompt)
            for _ in range(TOKENS - 1):
                order = list(last)
                self.decode([(last[s], position[s], s, True) for s in order])
                for i, s in enumerate(order):
                    last[s] = llama.llama_sampler_sample(self.samplers[s], self.context, i)
                    position[s] += 1
        return time.perf_counter() - start
