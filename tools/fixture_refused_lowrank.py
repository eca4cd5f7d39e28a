"""Adapters of the kinds of fixture_lowrank.py that a server must refuse, one fault each."""

import torch

from fixture_refused import MODEL, P, Refused, noise, with_value

Q = "model.layers.0.self_attn.q_proj"


def one(peft_type: str, name: str, what: str, names: str, tensors: dict, **config) -> Refused:
    """A faulty adapter of one linear (32 inputs and outputs)."""
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": f"patchbay/{MODEL}", "inference_mode": True}
    keys = {(key if key.startswith("base_model.") else f"{P}{key}"): value for key, value in tensors.items()}
    return Refused(name, what, names, common | {"peft_type": peft_type, "target_modules": Q} | config, keys)


def integers(*shape: int, least: int = 0, most: int = 8) -> torch.Tensor:
    """Fixed integers from `least` to below `most`."""
    return (torch.arange(torch.Size(shape).numel()) % (most - least) + least).reshape(shape)


def adalora() -> list[Refused]:
    """Faults of ADALORA files."""
    sound = {"lora_A": noise(2, 32), "lora_E": noise(2, 1), "lora_B": noise(32, 2)}
    pattern = lambda mask: {"rank_pattern": {f"{Q}.lora_E": mask}}
    return [
        one("ADALORA", "adalora_rank", "two ranks, the config says four", "init_r", sound, init_r=4),
        one(
            "ADALORA",
            "adalora_mask",
            "two ranks, the mask leaves one",
            "rank_pattern",
            sound,
            init_r=2,
            **pattern([True, False]),
        ),
        one("ADALORA", "adalora_mask_type", "a mask of numbers", "rank_pattern", sound, init_r=2, **pattern([1, 1])),
        one(
            "ADALORA",
            "adalora_mask_name",
            "a mask of a module that is not there",
            "layers.9",
            sound,
            init_r=2,
            rank_pattern={"layers.9.q_proj.lora_E": [True]},
        ),
        one(
            "ADALORA", "adalora_mask_key", "a mask without lora_E", "lora_E", sound, init_r=2, rank_pattern={Q: [True]}
        ),
        one(
            "ADALORA",
            "adalora_missing_e",
            "no lora_E",
            "lora_E",
            {key: value for key, value in sound.items() if key != "lora_E"},
            init_r=2,
        ),
        one(
            "ADALORA",
            "adalora_dora",
            "use_dora, which PEFT does not combine",
            "use_dora",
            sound,
            init_r=2,
            use_dora=True,
        ),
    ]


def lycoris() -> list[Refused]:
    """Faults of LOHA and LOKR files."""
    sound = {"hada_w1_a": noise(32, 2), "hada_w1_b": noise(2, 32), "hada_w2_a": noise(32, 2), "hada_w2_b": noise(2, 32)}
    kron = {"lokr_w1": noise(4, 4), "lokr_w2_a": noise(8, 2), "lokr_w2_b": noise(2, 8)}
    return [
        one("LOHA", "loha_rank", "rank 2, the config says 3", "hada_w1_a", sound, r=3),
        one(
            "LOHA",
            "loha_missing",
            "no hada_w2_b",
            "hada_w2_b",
            {key: value for key, value in sound.items() if key != "hada_w2_b"},
            r=2,
        ),
        one(
            "LOHA",
            "loha_convolution",
            "the core of a convolution",
            "hada_t1",
            sound | {"hada_t1": noise(2, 2, 1, 1)},
            r=2,
        ),
        one("LOHA", "loha_alpha", "an alpha that is no number", "alpha", sound, r=2, alpha="8"),
        one("LOKR", "lokr_sizes", "factors of another size", "lokr_w2", kron | {"lokr_w1": noise(4, 6)}, r=2),
        one("LOKR", "lokr_rank", "parts of rank 2, the config says 1", "lokr_w2_a", kron, r=1),
        one("LOKR", "lokr_both", "a factor whole and in parts", "lokr_w2", kron | {"lokr_w2": noise(8, 8)}, r=2),
        one(
            "LOKR",
            "lokr_missing",
            "no first factor",
            "lokr_w1",
            {key: value for key, value in kron.items() if key != "lokr_w1"},
            r=2,
        ),
        one(
            "LOKR",
            "lokr_dimensions",
            "a factor of three dimensions",
            "lokr_w1",
            kron | {"lokr_w1": noise(4, 4, 1)},
            r=2,
        ),
    ]


def vera() -> list[Refused]:
    """Faults of VERA and PVERA files."""
    sound = {
        "vera_lambda_b": noise(32),
        "vera_lambda_d": noise(4),
        "base_model.vera_A": noise(4, 32),
        "base_model.vera_B": noise(32, 4),
    }
    mean = {f"{key.replace('vera', 'pvera')}": value for key, value in sound.items()}
    mean |= {"pvera_lambda_d": noise(8), "base_model.pvera_A": noise(8, 32)}
    return [
        one(
            "VERA",
            "vera_unsaved",
            "no projections",
            "save_projection",
            {key: sound[key] for key in sound if "lambda" in key},
            r=4,
            save_projection=False,
        ),
        one(
            "VERA",
            "vera_missing",
            "no second projection",
            "vera_B",
            {key: sound[key] for key in sound if "vera_B" not in key},
            r=4,
        ),
        one(
            "VERA",
            "vera_narrow",
            "a projection of fewer inputs than the linear has",
            "vera_A",
            sound | {"base_model.vera_A": noise(4, 16)},
            r=4,
        ),
        one("VERA", "vera_rank", "rank 4, the config says 8", "vera_A", sound, r=8),
        one(
            "VERA",
            "vera_nan",
            "a value of a projection is NaN",
            "vera_A",
            with_value(sound, "base_model.vera_A", float("nan")),
            r=4,
        ),
        one(
            "VERA",
            "vera_shared_other",
            "a shared tensor of another kind",
            "randlora_A",
            sound | {"base_model.randlora_A": noise(4, 1, 32)},
            r=4,
        ),
        one("PVERA", "pvera_sample", "sampling", "sample_at_inference", mean, r=4, sample_at_inference=True),
        one(
            "PVERA",
            "pvera_half",
            "lambda_d has no second half",
            "pvera_lambda_d",
            mean | {"pvera_lambda_d": noise(4)},
            r=4,
        ),
    ]


def randlora() -> list[Refused]:
    """Faults of RANDLORA files."""
    bases = {"base_model.randlora_A": noise(16, 1, 32), "base_model.randlora_B": noise(32, 2, 16)}
    sound = {"randlora_lambda": noise(16, 2), "randlora_gamma": noise(2, 32)}
    return [
        one("RANDLORA", "randlora_unsaved", "no bases", "save_projection", sound, r=16, save_projection=False),
        one(
            "RANDLORA",
            "randlora_bases",
            "one base where two are needed",
            "randlora_B",
            sound | bases | {"base_model.randlora_B": noise(32, 1, 16)},
            r=16,
        ),
        one(
            "RANDLORA",
            "randlora_gamma",
            "a gamma of the wrong length",
            "randlora_gamma",
            sound | bases | {"randlora_gamma": noise(2, 16)},
            r=16,
        ),
        one(
            "RANDLORA",
            "randlora_copy",
            "bases of one linear that differ",
            f"{P}randlora_A",
            sound | bases | {"randlora_A": 1 + noise(16, 1, 32)},
            r=16,
        ),
    ]


def small() -> list[Refused]:
    """Faults of DELORA, GRALORA and TINYLORA files."""
    delora = {"delora_A": noise(2, 32), "delora_B": noise(32, 2), "delora_lambda": noise(1)}
    gralora = {"gralora_A": noise(2, 16, 4), "gralora_B": noise(2, 4, 16)}
    tiny = {
        "tinylora_A": noise(2, 32),
        "tinylora_B": noise(32, 2),
        "tinylora_P": noise(3, 2, 2),
        "base_model.tinylora_v.0": noise(3),
    }
    return [
        one("DELORA", "delora_rank", "rank 2, the config says 4", "delora_A", delora, r=4),
        one(
            "DELORA", "delora_lambda", "a strength per rank", "delora_lambda", delora | {"delora_lambda": noise(2)}, r=2
        ),
        one(
            "DELORA",
            "delora_w_norm",
            "norms of the wrong length",
            "delora_w_norm",
            delora | {"delora_w_norm": noise(16)},
            r=2,
        ),
        one("GRALORA", "gralora_blocks", "three blocks of 32 inputs", "gralora_k", gralora, r=4, gralora_k=3),
        one(
            "GRALORA",
            "gralora_general",
            "a general part that the config does not have",
            "gralora_A_general",
            gralora | {"gralora_A_general.weight": noise(2, 32), "gralora_B_general.weight": noise(32, 2)},
            r=4,
            gralora_k=2,
        ),
        one(
            "GRALORA",
            "gralora_no_general",
            "no general part although the config has one",
            "gralora_A_general",
            gralora,
            r=4,
            gralora_k=2,
            hybrid_r=2,
        ),
        one(
            "TINYLORA",
            "tinylora_unsaved",
            "no random matrices",
            "save_projection",
            {key: tiny[key] for key in tiny if "_P" not in key},
            r=2,
            u=3,
            save_projection=False,
        ),
        one(
            "TINYLORA",
            "tinylora_group",
            "numbers of a group that no linear is in",
            "tinylora_v.1",
            tiny | {"base_model.tinylora_v.1": noise(3)},
            r=2,
            u=3,
        ),
        one(
            "TINYLORA",
            "tinylora_no_group",
            "no numbers",
            "tinylora_v.0",
            {key: tiny[key] for key in tiny if "_v" not in key},
            r=2,
            u=3,
        ),
        one("TINYLORA", "tinylora_u", "three numbers, the config says four", "tinylora_v.0", tiny, r=2, u=4),
        one("TINYLORA", "tinylora_tying", "a share above one", "weight_tying", tiny, r=2, u=3, weight_tying=1.5),
    ]


def indexed() -> list[Refused]:
    """Faults of VBLORA and UNILORA files."""
    bank = {"base_model.vblora_vector_bank": noise(8, 16)}
    logits = bank | {"vblora_logits_A": noise(2, 2, 8), "vblora_logits_B": noise(2, 2, 8)}
    best = bank | {f"vblora_logits_{side}_topk_indices": integers(2, 2, 2).to(torch.uint8) for side in "AB"}
    best |= {f"vblora_logits_{side}_topk_weights": noise(2, 2, 1) for side in "AB"}
    sizes = {"r": 2, "num_vectors": 8, "vector_length": 16, "topk": 2}
    beyond = {"vblora_logits_A_topk_indices": integers(2, 2, 2, least=8, most=9).to(torch.uint8)}
    drawn = {
        "base_model.unilora_theta_d": noise(8),
        "unilora_indices_A": integers(2, 32),
        "unilora_indices_B": integers(32, 2),
    }
    drawn |= {"unilora_scales_A": noise(2, 32), "unilora_scales_B": noise(32, 2)}
    few = {"r": 2, "theta_d_length": 8, "save_indices": True}
    return [
        one(
            "VBLORA",
            "vblora_bank",
            "a bank of another size",
            "vblora_vector_bank",
            logits,
            **(sizes | {"num_vectors": 9}),
        ),
        one("VBLORA", "vblora_topk", "more of the best than there are", "topk", logits, **(sizes | {"topk": 9})),
        one(
            "VBLORA",
            "vblora_length",
            "vectors that do not divide the inputs",
            "vectors of length 12",
            logits | {"base_model.vblora_vector_bank": noise(8, 12)},
            **(sizes | {"vector_length": 12}),
        ),
        one(
            "VBLORA",
            "vblora_form",
            "all logits although the config says the best only",
            "topk_indices",
            logits,
            save_only_topk_weights=True,
            **sizes,
        ),
        one(
            "VBLORA",
            "vblora_index",
            "an index outside the bank",
            "topk_indices",
            best | beyond,
            save_only_topk_weights=True,
            **sizes,
        ),
        one(
            "VBLORA",
            "vblora_float",
            "indices that are no integers",
            "expected integers",
            best | {"vblora_logits_B_topk_indices": noise(2, 2, 2)},
            save_only_topk_weights=True,
            **sizes,
        ),
        one(
            "UNILORA",
            "unilora_unsaved",
            "no indices",
            "save_indices",
            {"base_model.unilora_theta_d": noise(8)},
            **(few | {"save_indices": False}),
        ),
        one(
            "UNILORA",
            "unilora_index",
            "an index outside theta",
            "unilora_indices_B",
            drawn | {"unilora_indices_B": integers(32, 2, least=7, most=9)},
            **few,
        ),
        one(
            "UNILORA",
            "unilora_negative",
            "a negative index",
            "unilora_indices_A",
            drawn | {"unilora_indices_A": integers(2, 32, least=-1)},
            **few,
        ),
        one(
            "UNILORA",
            "unilora_theta",
            "eight numbers, the config says nine",
            "theta_d_length",
            drawn,
            **(few | {"theta_d_length": 9}),
        ),
        one(
            "UNILORA",
            "unilora_scales",
            "no scales",
            "unilora_scales_A",
            {key: drawn[key] for key in drawn if "scales_A" not in key},
            **few,
        ),
    ]


def poly() -> list[Refused]:
    """Faults of POLY files."""
    sound = {
        "poly_lora_A": noise(2, 2, 16, 2),
        "poly_lora_B": noise(2, 2, 2, 16),
        "poly_router.module_logits": noise(3, 4),
    }
    sizes = {"r": 2, "n_tasks": 3, "n_skills": 2, "n_splits": 2}
    return [
        one("POLY", "poly_no_task", "three tasks and none is named", "task_id", sound, **sizes),
        one("POLY", "poly_task", "a task that is not there", "task_id", sound, task_id=3, **sizes),
        one(
            "POLY",
            "poly_router",
            "a router of other sizes",
            "module_logits",
            sound | {"poly_router.module_logits": noise(3, 2)},
            task_id=1,
            **sizes,
        ),
        one(
            "POLY",
            "poly_splits",
            "three splits of 32 inputs",
            "3 splits",
            sound,
            task_id=1,
            **(sizes | {"n_splits": 3}),
        ),
        one("POLY", "poly_type", "another router", "poly_type", sound, task_id=1, poly_type="other", **sizes),
    ]


def factored_refused() -> list[Refused]:
    """All of them."""
    return adalora() + lycoris() + vera() + randlora() + small() + indexed() + poly()
