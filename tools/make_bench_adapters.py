"""Writes random adapters of every kind for a base model, to measure what each kind costs when it is served.

    make_bench_adapters.py MODEL OUT [--kinds lora,miss,...] [--count 16]

OUT/<kind>-<NN> are directories as PEFT saves them, of the size that the kind's users take, on all linears; kinds that are
served from dense weights of their own are on the query and value projections only, PEFT's default for most of them.
"""

import argparse
import copy
import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftType, XLoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bench_formats
import fixture_dense  # noqa: F401  Rules for random values.
import fixture_rotation  # noqa: F401  The same, and butterfly factors without a CUDA extension.
import fixture_sparse  # noqa: F401
import ssf
import xlora
from fixture_affine import VALUES as AFFINE_VALUES
from fixture_cases import LINEARS, NORMS
from fixture_common import generator, random_like, randomize_adapter
from fixture_lowrank import VALUES as LOWRANK_VALUES

ALL = {"target_modules": LINEARS}
# PEFT's default targets of most kinds.
FEW = {"target_modules": ["q_proj", "v_proj"]}
# Files that PEFT does not write: what is in them, and how they are made.
FORMATS = bench_formats.formats(LINEARS, FEW["target_modules"])
VALUES = AFFINE_VALUES | LOWRANK_VALUES
# The spread of values is scaled down, so that logits stay finite on 24 layers of random weights.
SCALE = 0.05

# Random matrices that are not trained: a seed gives all adapters the same.
FROZEN = ("vera_A", "vera_B", "randlora_A", "randlora_B")

KINDS: dict[str, tuple[str, dict]] = {
    "lora": ("LORA", {"r": 16, "lora_alpha": 32} | ALL),
    "dora": ("LORA", {"r": 16, "lora_alpha": 32, "use_dora": True} | ALL),
    # Its adapters apply where a prompt has the token: `patchbay bench --vocab-size 2` makes such prompts.
    "alora": ("LORA", {"r": 16, "lora_alpha": 32, "alora_invocation_tokens": [1]} | ALL),
    "ssf": ("SSF", ALL),
    "miss": ("MISS", {"r": 64} | ALL),
    "miss-bat": ("MISS", {"r": 64, "init_weights": "bat"} | FEW),
    "ia3": ("IA3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "ln-tuning": ("LN_TUNING", {"target_modules": NORMS}),
    "trainable-tokens": ("TRAINABLE_TOKENS", {"token_indices": [5, 17, 42], "target_modules": ["embed_tokens"]}),
    "beft": ("BEFT", {"target_modules": ["v_proj"]}),
    "adalora": ("ADALORA", {"init_r": 12, "target_r": 8, "lora_alpha": 32, "total_step": 10} | ALL),
    "loha": ("LOHA", {"r": 4, "alpha": 8} | ALL),
    "lokr": ("LOKR", {"r": 8, "alpha": 8} | ALL),
    "vera": ("VERA", {"r": 256} | ALL),
    "pvera": ("PVERA", {"r": 256} | ALL),
    "randlora": ("RANDLORA", {"r": 32} | FEW),
    "delora": ("DELORA", {"r": 16} | ALL),
    "gralora": ("GRALORA", {"r": 32, "gralora_k": 2} | ALL),
    "vblora": ("VBLORA", {"r": 4, "num_vectors": 256, "vector_length": 128, "topk": 2} | ALL),
    "tinylora": ("TINYLORA", {"r": 2, "u": 64} | ALL),
    "unilora": ("UNILORA", {"r": 4, "theta_d_length": 4096, "save_indices": True} | ALL),
    "poly": ("POLY", {"r": 8, "n_tasks": 1, "n_skills": 4, "n_splits": 1} | ALL),
    "hra": ("HRA", {"r": 8} | ALL),
    "deft": ("DEFT", {"r": 8} | ALL),
    "peanut": ("PEANUT", {"r": 16} | ALL),
    "hira": ("HIRA", {"r": 16} | FEW),
    "glora": ("GLORA", {"r": 4} | FEW),
    "osf": ("OSF", FEW),
    "frod": ("FROD", {"progressbar": False} | FEW),
    "shira": ("SHIRA", {"r": 16, "random_seed": 5} | ALL),
    "supertuning": ("SUPERTUNING", {"sparsity": 0.99} | ALL),
    "c3a": ("C3A", {"block_size": 64} | ALL),
    "fourierft": ("FOURIERFT", {"n_frequency": 1000, "scaling": 150.0} | ALL),
    "waveft": ("WAVEFT", {"n_frequency": 2592, "scaling": 25.0} | ALL),
    "road": ("ROAD", {"group_size": 64} | ALL),
    "oft": ("OFT", {"oft_block_size": 32} | ALL),
    "boft": ("BOFT", {"boft_block_size": 4} | ALL),
    "boft-2": ("BOFT", {"boft_block_size": 4, "boft_n_butterfly_factor": 2} | FEW),
    "prompt-tuning": ("PROMPT_TUNING", {"num_virtual_tokens": 20}),
    "p-tuning": ("P_TUNING", {"num_virtual_tokens": 20, "encoder_hidden_size": 128}),
    "multitask-prompt": ("MULTITASK_PROMPT_TUNING", {"num_virtual_tokens": 20}),
    "cpt": ("CPT", {"cpt_token_ids": [5] * 20, "cpt_mask": [1] * 20, "cpt_tokens_type_mask": [1, 2, 2, 3, 4] * 4}),
    "prefix": ("PREFIX_TUNING", {"num_virtual_tokens": 20}),
    "cartridge": ("CARTRIDGE", {"num_virtual_tokens": 128}),
    "xlora": ("XLORA", {"experts": {"count": 2, "r": 16, "lora_alpha": 32} | ALL}),
}


def randomize(model: torch.nn.Module, kind: str) -> None:
    """Small random values."""
    before = {name: param.data.clone() for name, param in model.named_parameters() if param.requires_grad}
    randomize_adapter(model, kind, values=VALUES)
    for name, param in model.named_parameters():
        if param.requires_grad and param.is_floating_point():
            param.data = before[name] + SCALE * (param.data - before[name])


def make_ssf(model: torch.nn.Module, config: dict, out: Path) -> None:
    """SSF is not one of PEFT's."""
    config = ssf.SsfConfig(**config)
    ssf.attach(model, config)
    rng = generator("ssf")
    for name, param in model.named_parameters():
        if "ssf_" in name:
            neutral = 1.0 if "scale" in name else 0.0
            param.data = neutral + SCALE * (random_like(name, param.data, rng) - neutral)
    ssf.save(model, config, out)


def make_xlora(model: torch.nn.Module, config: dict, out: Path) -> None:
    """X-LoRA is made of LoRAs on disk, and PEFT cannot save it."""
    experts = config.pop("experts")
    with tempfile.TemporaryDirectory() as scratch:
        paths = {str(number): str(Path(scratch, str(number))) for number in range(experts.pop("count"))}
        for path in paths.values():
            expert = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **experts))
            randomize(expert, "lora")
            expert.save_pretrained(path)
            model = expert.unload()
        model.config.use_cache = False  # PEFT asks for it.
        hidden = model.config.hidden_size
        model = get_peft_model(model, XLoraConfig(task_type="CAUSAL_LM", hidden_size=hidden, adapters=paths, **config))
        rng = generator("xlora")
        for name, param in model.named_parameters():
            if xlora.CLASSIFIER in name:
                param.data = random_like(name, param.data, rng)
        xlora.save(model, out)


def vary(first: Path, others: list[Path]) -> None:
    """Copies of an adapter with every trained value changed a little, so that no two are equal."""
    for directory in others:
        shutil.copytree(first, directory, dirs_exist_ok=True)
        rng = generator(directory.name)
        change = lambda value: value * (1 + 0.02 * torch.randn(value.shape, generator=rng))
        for weights in sorted(directory.rglob("*.safetensors")):
            is_trained = lambda name, value: value.is_floating_point() and not name.endswith(FROZEN)
            changed, tensors = {}, load_file(weights)
            for name, value in tensors.items():
                # Rows of an embedding that shares its weight with the head are in the file twice.
                same = next((other for other in changed if tensors[other].equal(value)), None)
                changed[name] = changed[same].clone() if same else change(value) if is_trained(name, value) else value
            save_file(changed, weights, metadata={"format": "pt"})


def make(model_dir: Path, kind: str, out: Path, count: int) -> None:
    """All adapters of one kind: one that PEFT or its format's rule makes, and variations of it."""
    directories = [out / f"{kind}-{idx:02d}" for idx in range(count)]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    torch.manual_seed(0)
    if kind in FORMATS:
        what, write = FORMATS[kind]
        write(model, directories[0], randomize)
    else:
        peft_type, config = KINDS[kind]
        what = json.dumps(config)
        if peft_type == "SSF":
            make_ssf(model, config, directories[0])
        elif peft_type == "XLORA":
            make_xlora(model, copy.deepcopy(config), directories[0])
        else:
            config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)](task_type="CAUSAL_LM", **config)
            model = get_peft_model(model, config)
            randomize(model, kind)
            model.save_pretrained(directories[0])
    vary(directories[0], directories[1:])
    size = sum(path.stat().st_size for path in directories[0].rglob("*.safetensors"))
    print(f"{kind}: {count} adapters of {size / 1e6:.2f} MB, {what}", flush=True)


def main() -> None:
    """Every kind asked for, one after the other."""
    known = [*KINDS, *FORMATS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", default=",".join(known), help="names separated by commas (default: all)")
    parser.add_argument("--count", type=int, default=16)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for kind in args.kinds.split(","):
        if kind not in known:
            parser.error(f"unknown kind {kind}; known are {', '.join(known)}")
    for kind in args.kinds.split(","):
        make(args.model, kind, args.out, args.count)


if __name__ == "__main__":
    main()
