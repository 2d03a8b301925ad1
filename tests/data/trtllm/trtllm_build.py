"""Stands in for trtllm-build 1.2.1 in tests. Shares no code with engine-recipes; the standard library is all it needs.

Takes the recorded command line (options.json) and nothing else. Loads a checkpoint as TensorRT-LLM does: fills missing
keys with its defaults, demands exactly the tensors and shapes that its loaders demand for LlamaForCausalLM,
Qwen2ForCausalLM and Qwen3ForCausalLM, and only warns of others. Then it writes, in TensorRT-LLM's order, the timing
cache, config.json, and for each rank a file as large as its weights.

The environment asks for trouble: STAND_IN_FAILS names a way to fail (see `trouble`), STAND_IN_GPUS the visible GPUs.
"""

import argparse
import fnmatch
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

VERSION = "1.2.1"
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "F8_E4M3": 1}
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
MAPPING_KEYS = {
    *("world_size", "rank", "gpus_per_node", "cp_size", "cp_config", "tp_size", "pp_size", "moe_cluster_size"),
    *("moe_tp_size", "moe_ep_size", "attn_tp_size", "attn_cp_size", "auto_parallel", "enable_attention_dp"),
    *("enable_lm_head_tp_in_adp", "pp_partition"),
}
QUANTIZATION_KEYS = {
    *("quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val", "use_meta_recipe"),
    *("has_zero_point", "pre_quant_scale", "exclude_modules", "mamba_ssm_cache_dtype"),
}
MAGIC = b"ptrt"


def say(text, who="TRT-LLM", level="I"):
    print(time.strftime(f"[%m/%d/%Y-%H:%M:%S] [{who}] [{level}] {text}"), flush=True)


TABLE = json.loads(Path(__file__).with_name("options.json").read_text())["options"]


def parser():
    found = argparse.ArgumentParser("trtllm-build", allow_abbrev=False)
    for option in TABLE:
        if option["type"] == "flag":
            found.add_argument(option["name"], action="store_true")
            continue
        found.add_argument(
            option["name"],
            *option.get("aliases", []),
            type=int if option["type"] == "int" else str,
            choices=option.get("choices"),
            default=option.get("default"),
            nargs=option.get("nargs"),
        )
    return found


class Config:
    """config.json with TensorRT-LLM's defaults for what it leaves out."""

    def __init__(self, told):
        self.told = told
        self.architecture = told["architecture"]
        if self.architecture not in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
            raise AssertionError(f"Unsupported model architecture: {self.architecture}")
        for key in ("dtype", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if key not in told:
                raise TypeError(f"__init__() missing 1 required keyword-only argument: '{key}'")
        qwen = "Qwen" in self.architecture
        if qwen and not {"qwen_type", "seq_length"} <= told.keys():
            raise AttributeError("'QWenConfig' object has no attribute 'qwen_type'")
        self.hidden, self.layers, self.heads = (
            told[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
        )
        self.kv_heads = told.get("num_key_value_heads") or self.heads
        self.inner = told.get("intermediate_size") or 4 * self.hidden
        self.head_size = told.get("head_size") or self.hidden // self.heads
        self.vocab = told["vocab_size"]
        self.qkv_bias = told.get("attn_bias", qwen)
        self.dense_bias = self.qkv_bias and not qwen
        self.mlp_bias = told.get("mlp_bias", False)
        self.head_norms = told.get("qwen_type") == "qwen3"
        self.code = CODES[told["dtype"]]
        self.parallel_embedding = told.get("use_parallel_embedding", False)
        scaling = told.get("rotary_scaling") or {}
        kind = scaling.get("rope_type") or scaling.get("type")
        if kind not in (None, "linear", "dynamic", "longrope", "llama3", "yarn", "mrope"):
            raise ValueError(f"Unsupported rotary scaling type: {kind}")
        mapping = told.get("mapping") or {}
        refuse_keys("Mapping", mapping, MAPPING_KEYS)
        self.tp, self.pp = mapping.get("tp_size", 1), mapping.get("pp_size", 1)
        self.world = mapping.get("world_size", 1)
        if self.world != self.tp * self.pp * mapping.get("cp_size", 1):
            raise ValueError(f"world_size must equal to tp_size * pp_size * cp_size, but got {self.world}")
        quantization = told.get("quantization") or {}
        refuse_keys("QuantConfig", quantization, QUANTIZATION_KEYS)
        self.algorithm = quantization.get("quant_algo")
        self.cache = quantization.get("kv_cache_quant_algo")
        self.group = quantization.get("group_size", 128)
        self.excluded = quantization.get("exclude_modules") or []
        if self.algorithm not in (None, "FP8", "W4A16_AWQ", "W8A16", "W4A16"):
            raise ValueError(f"no loader here for {self.algorithm}")
        if self.algorithm == "W4A16_AWQ" and (self.group not in (64, 128) or not quantization.get("pre_quant_scale")):
            raise RuntimeError("[TensorRT-LLM][ERROR] Assertion failed: No valid weight only groupwise GEMM tactic")

    def stage(self, rank):
        """(pipeline stage, how many layers it has)"""
        stage = rank // self.tp
        return stage, self.layers // self.pp + (stage < self.layers % self.pp)

    def is_quantised(self, module):
        return self.algorithm is not None and not any(fnmatch.fnmatchcase(module, name) for name in self.excluded)


def refuse_keys(what, given, known):
    unknown = sorted(given.keys() - known)
    if unknown:
        raise TypeError(f"{what}.__init__() got an unexpected keyword argument '{unknown[0]}'")


def demanded(config, rank):
    """Tensor -> (dtype code, shape) that the loader of a rank demands."""
    stage, layers = config.stage(rank)
    hidden, code, tp = config.hidden, config.code, config.tp
    found = {}
    query = config.heads // tp * config.head_size
    keys = (config.kv_heads + tp - 1) // tp * config.head_size
    inner = config.inner // tp
    shapes = {
        "attention.qkv": (query + 2 * keys, hidden),
        "attention.dense": (hidden, query),
        "mlp.fc": (inner, hidden),
        "mlp.gate": (inner, hidden),
        "mlp.proj": (hidden, inner),
    }
    biased = {
        "attention.qkv": config.qkv_bias,
        "attention.dense": config.dense_bias,
        **dict.fromkeys(("mlp.fc", "mlp.gate", "mlp.proj"), config.mlp_bias),
    }
    table = math.ceil(config.vocab / tp)
    if stage == 0:
        rows = table if config.parallel_embedding and tp > 1 else config.vocab
        found["transformer.vocab_embedding.weight"] = (code, (rows, hidden))
    for layer in range(layers):
        at = f"transformer.layers.{layer}."
        found[at + "input_layernorm.weight"] = found[at + "post_layernorm.weight"] = (code, (hidden,))
        if config.head_norms:
            for name in ("q", "k"):
                found[f"{at}attention.{name}_layernorm.weight"] = (code, (config.head_size,))
        if config.cache:
            found[at + "attention.kv_cache_scaling_factor"] = ("F32", (1,))
        for name, shape in shapes.items():
            found.update(linear(config, at + name, shape))
            if biased[name]:
                found[f"{at}{name}.bias"] = (code, shape[:1])
    if stage == config.pp - 1:
        found["transformer.ln_f.weight"] = (code, (hidden,))
        found["lm_head.weight"] = (code, (table, hidden))
    return found


def linear(config, name, shape):
    rows, columns = shape
    if config.is_quantised(name) and config.algorithm == "FP8":
        yield f"{name}.weight", ("F8_E4M3", shape)
        yield f"{name}.weights_scaling_factor", ("F32", (1,))
        yield f"{name}.activation_scaling_factor", ("F32", (1,))
    elif config.is_quantised(name) and config.algorithm == "W4A16_AWQ":
        yield f"{name}.weight", ("I8", (rows // 2, columns))
        yield f"{name}.weights_scaling_factor", ("F32", (rows, columns // config.group))
        yield f"{name}.prequant_scaling_factor", (config.code, (columns,))
    else:  # weight-only checkpoints are quantised as they are loaded
        yield f"{name}.weight", (config.code, shape)


def read_header(path):
    """Tensor -> (dtype code, shape, bytes [start, stop) in the file)"""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: (of["dtype"], tuple(of["shape"]), tuple(start + offset for offset in of["data_offsets"]))
        for name, of in header.items()
    }


def load(config, folder, rank):
    """Check the tensors of a rank; the bytes of its weights in the engine."""
    path = folder / f"rank{rank}.safetensors"
    provided, required = read_header(path), demanded(config, rank)
    shared = "lm_head.weight" not in provided and "transformer.vocab_embedding.weight" in provided
    if shared:
        required.pop("lm_head.weight", None)
    missing = required.keys() - provided.keys()
    if missing:
        raise RuntimeError(f"Required but not provided tensors:{missing}")
    for name in sorted(provided.keys() - required.keys()):
        say(f"Provided but not required tensors: {name}", level="W")
    total = 0
    for name, (code, shape) in required.items():
        there = provided[name]
        if there[1] != shape:
            raise AssertionError(
                f"The value updated is not the same shape as the original. Updated: {there[1]}, original: {shape}"
            )
        if there[0] != code and not (code == "F8_E4M3" and there[0] == "I8"):
            raise AssertionError(f"{name} is {there[0]}, expected {code}")
        size = math.prod(shape) * BYTES[there[0]]
        if name.removesuffix(".weight").endswith(LINEARS) and config.is_quantised(name.removesuffix(".weight")):
            size = int(size * {"W8A16": 0.5, "W4A16": 0.25}.get(config.algorithm, 1))
        total += size
    tables = [provided.get(name) for name in ("lm_head.weight", "transformer.vocab_embedding.weight")]
    if all(tables) and tables[0][1] == tables[1][1]:
        data = path.read_bytes()
        one, other = (data[slice(*of[2])] for of in tables)
        total -= len(one) if one == other else 0
    return total


def check_combinations(arguments, config):
    """What TensorRT-LLM stops at."""
    if arguments.use_paged_context_fmha == "enable":
        if config.cache == "FP8" and config.algorithm != "FP8":
            raise RuntimeError("FP8 Paged Context FMHA only works with fp8 quantization workflow currently.")
        if config.cache == "INT8":
            raise RuntimeError("Paged Context FMHA doesn't work with int8 kv cache currently.")
    if arguments.multiple_profiles == "enable" and arguments.opt_num_tokens is not None:
        raise RuntimeError("opt_num_tokens must be None when multiple_profiles is enabled")
    assert arguments.streamingllm != "enable", "StreamingLLM is not supported anymore"


def build_config(arguments, told):
    """What the engine's config.json keeps of the command line; plugins apart, and as booleans where they are that."""
    words = {"enable": True, "disable": False}
    groups = {"plugin": {}, "size": {"max_seq_len": None}, "logits": {}, "build": {}}
    for option in TABLE:
        group = "plugin" if option["group"] == "feature" else option["group"]
        if group in groups and option["name"] not in ("--dry_run", "--visualize_network"):
            value = getattr(arguments, option["name"][2:])
            groups[group][option["name"][2:]] = words.get(value, value) if option["type"] == "bool" else value
    groups["size"]["max_seq_len"] = arguments.max_seq_len or told["max_position_embeddings"]
    kind = (arguments.kv_cache_type or "paged").upper()
    sizes = {**groups["size"], **groups["logits"], **groups["build"]}
    return {**sizes, "kv_cache_type": kind, "plugin_config": groups["plugin"], "lora_config": {}}


def timing_cache(path):
    """How many builds filled it; 0 for a fresh one."""
    if not path or not Path(path).is_file():
        return 0
    data = Path(path).read_bytes()
    if data.startswith(MAGIC):
        return int(data[len(MAGIC) :])
    say("[stdArchiveReader.cpp::StdArchiveReaderInitCommon::36] Error Code 1: Serialization (Serialization assertion "
        "magicTagRead == kMAGIC_TAG failed.Magic tag does not match)", "TRT", "E")  # fmt: skip
    if os.environ.get("STAND_IN_FAILS") == "cache":
        os.kill(os.getpid(), signal.SIGSEGV)
    say("Invalid timing cache, using freshly created one", level="W")
    return 0


def trouble(arguments, config):
    """Fail in a way that was recorded."""
    kind = os.environ.get("STAND_IN_FAILS", "")
    if kind == "oom":
        say(
            "[virtualMemoryBuffer.cpp::resizePhysical::140] Error Code 2: OutOfMemory (no further information)",
            "TRT",
            "E",
        )
        say("Requested amount of GPU memory (24793579520 bytes) could not be allocated. There may not be enough free "
            "memory for allocation to succeed.", "TRT", "W")  # fmt: skip
        say("Engine building failed, please check the error log.", level="E")
        raise AssertionError
    if kind == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(os.environ["STAND_IN_PIDS"]).write_text(f"{os.getpid()} {child.pid}")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if kind in ("SIGKILL", "SIGSEGV"):
        os.kill(os.getpid(), getattr(signal, kind))
    if kind == "lie":
        say("Total time of building all engines: 00:00:27")
        sys.exit(0)


def main():
    arguments = parser().parse_args()
    print(f"[TensorRT-LLM] TensorRT-LLM version: {VERSION}", flush=True)
    workers = min(int(os.environ.get("STAND_IN_GPUS", "1")), arguments.workers)
    if workers == 0:
        raise ValueError("max_workers must be greater than 0")
    folder, out = Path(arguments.checkpoint_dir), Path(arguments.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    told = json.loads((folder / "config.json").read_text())
    config = Config(told)
    check_combinations(arguments, config)
    for rank in range(config.world):
        size = load(config, folder, rank)
        say("Total time of constructing network from module object 2.79 seconds")
        if rank == 0:
            builds = timing_cache(arguments.input_timing_cache)
            trouble(arguments, config)
            say("Engine generation completed in 15.4544 seconds.", "TRT")
            Path(arguments.output_timing_cache).write_bytes(MAGIC + str(builds + 1).encode())
            engine = {"version": VERSION, "pretrained_config": told, "build_config": build_config(arguments, told)}
            if os.environ.get("STAND_IN_FAILS") == "keys":
                engine.pop("build_config")
            (out / "config.json").write_text(json.dumps(engine, indent=4))
        else:
            say("Engine generation completed in 15.4544 seconds.", "TRT")
        if os.environ.get("STAND_IN_FAILS") == "half" and rank >= config.world / 2:
            break
        say(f"Serializing engine to {out}/rank{rank}.engine...")
        with (out / f"rank{rank}.engine").open("wb") as file:
            file.write(b"ftrt")
            file.truncate(size // (8 if os.environ.get("STAND_IN_FAILS") == "short" else 1) + 4096)
        say("Engine serialized. Total time: 00:00:19")
    say("Total time of building all engines: 00:00:47")


if __name__ == "__main__":
    main()
