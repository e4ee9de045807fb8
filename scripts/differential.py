#!/usr/bin/env python3
"""Random cases through the peers' own published code and through `temper algos eval`.

    python scripts/differential.py --temper target/release/temper --cases 200 --seed 1 [FAMILY ...]

The peers are what the interpreter can import: torch (needed), verl, trl. A peer that is missing is skipped, and said
to be; modules that verl imports for its infrastructure only (ray and the like) are replaced by stubs where they are
missing. Numbers are compared as in `algos/tests/vectors.rs`: 1e-6 / 1e-9, and 1e-5 / 1e-6 for metrics, which peers
compute in f32. Exit code 1 where a case differs; what docs/algorithms.md lists as different shows up here too.
"""

import argparse
import importlib.abc
import importlib.machinery
import json
import math
import os
import subprocess
import sys
import tempfile
import types
import zlib
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import torch

torch.compile = lambda *args, **_: args[0] if args and callable(args[0]) else (lambda f: f)
AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
INFRASTRUCTURE = {"ray", "codetiming", "hydra", "nvtx", "orjson", "vllm", "torchdata", "megatron", "peft", "antlr4"}


class Anything:
    """A stand-in that can be called, subscripted and used as a decorator."""

    def __init__(self, *_, **__):
        pass

    def __call__(self, *args, **_):
        return args[0] if len(args) == 1 and callable(args[0]) else Anything()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class StubModule(types.ModuleType):
    __path__ = []
    __version__ = "99.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Anything,), {}) if name[:1].isupper() else Anything()


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds infrastructure that is not installed: it stands last, so what is installed is found before."""

    def find_spec(self, name, path=None, target=None):
        known = name.split(".")[0] in INFRASTRUCTURE
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec):
        return StubModule(spec.name)

    def exec_module(self, module):
        pass


class Random:
    """Arrays as batches have them; four decimals, so that every parser reads the same numbers."""

    def __init__(self, seed):
        self.g = np.random.default_rng(seed)

    def pick(self, *values):
        return values[self.g.integers(len(values))]

    def chance(self, p):
        return bool(self.g.random() < p)

    def int(self, low, high):
        return int(self.g.integers(low, high + 1))

    def normal(self, *shape, scale=1.0):
        return np.round(self.g.normal(size=shape) * scale, 4)

    def uniform(self, low, high, *shape):
        return np.round(self.g.uniform(low, high, size=shape), 4)

    def log_probs(self, *shape):
        return np.minimum(np.round(-self.g.gamma(1.2, 1.0, size=shape), 4), -1e-4)

    def near(self, base, scale=None):
        scale = self.pick(0.0, 0.02, 0.2, 1.0, 5.0, 40.0) if scale is None else scale
        return np.round(-np.abs(base + self.g.normal(size=base.shape) * scale) - 1e-4, 4)

    def mask(self, rows, cols):
        """Right-padded rows, holes, everything, rows without tokens, or one token in all."""
        lens = self.g.integers(0, cols + 1, size=(rows, 1))
        ragged, holes = np.arange(cols) < lens, self.g.random((rows, cols)) < 0.6
        mask = self.pick(ragged, np.arange(cols) < np.maximum(lens, 1), holes, holes | True, holes & False).astype(int)
        if not mask.any():
            mask[self.int(0, rows - 1), self.int(0, cols - 1)] = 1
        return mask

    def shape(self, rows=6, cols=8):
        return self.int(1, rows), self.int(1, cols)

    def groups(self, rows):
        count = self.pick(1, rows, max(1, rows // 2))
        return [f"u{self.int(0, count - 1)}" for _ in range(rows)]

    def rewards(self, mask):
        if self.chance(0.3):
            return self.normal(*mask.shape)
        rewards = np.zeros(mask.shape)
        rewards[:, -1] = self.pick(self.normal(len(mask)), self.g.integers(0, 2, len(mask)))
        return rewards

    def advantages(self, *shape):
        whole_rows = np.repeat(self.normal(shape[0], 1), shape[1], axis=1)
        return self.pick(whole_rows, np.sign(whole_rows), self.normal(*shape, scale=10))

    def counts(self):
        counts = {"batch_num_tokens": self.pick(7, 31, 100), "global_batch_size": self.pick(2, 12)}
        return {"dp_size": self.pick(1, 2, 3), **counts} if self.chance(0.5) else {}


# One function of a peer: `draw` gives inputs and params, `run` calls the peer on tensors.
Family = namedtuple("Family", "name source function draw run grads ints", defaults=((), ()))


def plain(value):
    """Nested lists of numbers; what is not finite is a text, as the schema has it."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def expected(family, inputs, params):
    """The peer's outputs and gradients; an error as the schema writes it."""
    tensors = {}
    for key, value in inputs.items():
        if isinstance(value, np.ndarray):
            tensors[key] = torch.tensor(value, dtype=torch.int64 if key in family.ints else torch.float64)
        else:
            tensors[key] = np.array(value, dtype=object) if isinstance(value, list) else value
    asked = [key for key in family.grads if tensors.get(key) is not None]
    for key in asked:
        tensors[key].requires_grad_()
    try:
        out = family.run(tensors, params)
    except Exception as error:  # whatever the peer raises is its answer
        return {"error": {"type": type(error).__name__, "message": str(error)[:200]}}, {}
    found = [None] * len(asked)
    if asked and out["loss"].requires_grad:
        found = torch.autograd.grad(out["loss"], [tensors[key] for key in asked], allow_unused=True)
    grads = {k: torch.zeros_like(tensors[k]) if g is None else g for k, g in zip(asked, found)}
    detached = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in out.items()}
    return plain(detached), plain(grads)


def differences(at, want, got, tolerance):
    """Paths at which two values differ."""
    if isinstance(want, dict):
        f32 = (1e-5, 1e-6)
        return [d for k, v in want.items() if k in got for d in differences(f"{at}.{k}", v, got[k], f32)]
    if isinstance(want, list):
        if not isinstance(got, list) or len(want) != len(got):
            return [f"{at}: another shape"]
        return [d for w, g in zip(want, got) for d in differences(at, w, g, tolerance)]
    want, got = float(want), math.nan if isinstance(got, (list, type(None))) else float(got)
    equal = want == got or (math.isnan(want) and math.isnan(got))
    close = equal or abs(want - got) <= tolerance[1] + tolerance[0] * abs(want)
    return [] if close else [f"{at}: expected {want}, got {got}"]


def evaluate(temper, family, cases):
    with tempfile.TemporaryDirectory() as directory:
        document, output = (os.path.join(directory, name) for name in ("in.json", "out.json"))
        with open(document, "w", encoding="utf-8") as file:
            json.dump({"source": family.source, "function": family.function, "cases": cases}, file)
        subprocess.run([temper, "algos", "eval", document, "--output", output], check=True)
        with open(output, encoding="utf-8") as file:
            return json.load(file)["cases"]


def compare(family, cases, seed, temper):
    """Number of cases that agree, that both refuse, and what differs."""
    drawn = [family.draw(Random(zlib.crc32(family.name.encode()) + 100003 * seed + i)) for i in range(cases)]
    document = lambda i, inputs, params: {"name": f"{family.name}/{i}", "inputs": plain(inputs), "params": params}
    documents = [document(i, *case) for i, case in enumerate(drawn)]
    agree, refused, wrong = 0, 0, []
    for (inputs, params), document, result in zip(drawn, documents, evaluate(temper, family, documents)):
        want, grads = expected(family, inputs, params)
        refusal = result["outputs"].get("error")
        found = []
        if "error" in want and refusal:
            refused += 1
            continue
        if "error" in want or refusal:
            found = [f"peer: {want.get('error')}, temper: {refusal}"]
        else:
            for part, values in (("outputs", want), ("grads", grads)):
                for key, value in values.items():
                    bound = (1e-5, 1e-6) if "frac" in key else (1e-6, 1e-9)
                    found += differences(f"{part}.{key}", value, result[part].get(key), bound)
        agree += not found
        wrong += [(document, found[0])] if found else []
    return agree, refused, wrong


def verl_families():
    import verl.trainer.ppo.core_algos as core
    from verl.trainer.ppo import rollout_corr_helper as correction
    from verl.workers.config.actor import ActorConfig, PolicyLossConfig

    source = "verl core_algos"

    def actor(params):
        inner = {k: v for k, v in params.items() if k in PolicyLossConfig.__dataclass_fields__}
        own = {k: v for k, v in params.items() if k not in inner}
        policy = PolicyLossConfig(**inner)
        return ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, policy_loss=policy, **own)

    def advantage(name, draw_more, call):
        def draw(r):
            mask = r.mask(*r.shape(9))
            more, params = draw_more(r, mask)
            inputs = {"token_level_rewards": r.rewards(mask), "response_mask": mask, "index": r.groups(len(mask))}
            return {**inputs, **more}, params

        def run(t, params):
            function = getattr(core, f"compute_{name}")
            return dict(zip(("advantages", "returns"), call(function, t, params)))

        return Family(name, source, f"compute_{name}", draw, run, ints=("response_mask",))

    nothing = lambda r, mask: ({}, {})

    def grouped(function, t, params):
        return function(t["token_level_rewards"].clone(), t["response_mask"], t["index"], **params)

    normalised = lambda r, mask: ({}, {"norm_adv_by_std_in_grpo": r.chance(0.5), "epsilon": r.pick(1e-6, 1e-4)})
    yield advantage("grpo_outcome_advantage", normalised, grouped)
    yield advantage("rloo_outcome_advantage", nothing, grouped)
    yield advantage("rloo_vectorized_outcome_advantage", nothing, grouped)
    yield advantage("gpg_outcome_advantage", lambda r, m: ({}, {"f_norm": r.pick(1.0, 2.5)}), grouped)
    def loss(name, draw_params):
        def draw(r):
            mask = r.mask(*r.shape())
            old = r.log_probs(*mask.shape)
            weights = r.uniform(0, 3, *mask.shape) if r.chance(0.4) else None
            params = {"loss_agg_mode": r.pick(*AGGREGATIONS), **draw_params(r)}
            counts = r.counts()
            inputs = {"old_log_prob": old, "log_prob": r.near(old), "advantages": r.advantages(*mask.shape)}
            inputs |= {"response_mask": mask, "rollout_is_weights": weights}
            return inputs, {**params, "global_batch_info": counts} if counts else params

        def run(t, params):
            arrays = (t["old_log_prob"], t["log_prob"], t["advantages"], t["response_mask"].bool())
            function = getattr(core, f"compute_policy_loss_{name}")
            options = {"config": actor(params), "rollout_is_weights": t["rollout_is_weights"]}
            value, metrics = function(*arrays, params["loss_agg_mode"], **options)
            return {"loss": value, "metrics": metrics}

        function = f"compute_policy_loss_{name}"
        return Family(name, source, function, draw, run, grads=("log_prob",), ints=("response_mask",))

    def clip(r):
        bounds = {"clip_ratio_low": r.pick(None, 0.2, 3e-4), "clip_ratio_high": r.pick(None, 0.28, 4e-4, 2.0)}
        return {"clip_ratio": r.pick(0.1, 0.2, 0.3), **bounds}

    yield loss("vanilla", lambda r: {**clip(r), "clip_ratio_c": r.pick(3.0, 1.5, 10.0)})
    yield from (loss(name, clip) for name in ("gspo", "cispo", "geo_mean"))
    divergence = lambda r: {**clip(r), "clip_ratio_c": r.pick(20.0, 1.2)}
    yield from (loss(name, divergence) for name in ("dppo_tv", "dppo_kl"))
    yield loss("sapo", lambda r: {"tau_pos": r.pick(1.0, 2.0), "tau_neg": r.pick(1.05, 3.0)})
    yield loss("gpg", lambda r: {})
    yield loss("dro", lambda r: {"dro_beta": r.pick(0.01, 1.0)})

    def draw_weights(r):
        mask = r.mask(*r.shape())
        bounds = r.pick(2.0, 1.1, "0.5_2.0", "0.9_1.2")
        params = {"rollout_is": r.pick("token", "sequence"), "rollout_is_threshold": bounds}
        ratio = r.normal(*mask.shape, scale=r.pick(0.0, 0.1, 0.5, 2.0))
        return {"log_ratio": ratio, "response_mask": mask}, {**params, "rollout_is_batch_normalize": r.chance(0.5)}

    def run_weights(t, params):
        values = correction.compute_rollout_correction_weights(t["log_ratio"], t["response_mask"], **params)
        return dict(zip(("weights", "metrics"), values))

    name = "compute_rollout_correction_weights"
    source = "verl rollout_corr_helper"
    yield Family("rollout_weights", source, name, draw_weights, run_weights, ints=("response_mask",))


def torch_families():
    def draw(r):
        size = r.int(1, 5)
        name = r.pick("AdamW", "Adam", "SGD", "RMSprop")
        params = {"optimizer": name, "max_norm": r.pick(None, 1.0, 0.1), "lr": r.pick(1e-3, 0.1)}
        if name.startswith("Adam"):
            params |= {"betas": r.pick([0.9, 0.999], [0.95, 0.9]), "weight_decay": r.pick(0.0, 0.1)}
        return {"p0": r.normal(size), "g": r.normal(6, size)}, params

    def run(t, params):
        options = {k: v for k, v in params.items() if k not in ("optimizer", "max_norm")}
        weight = torch.nn.Parameter(t["p0"].clone())
        optimizer = getattr(torch.optim, params["optimizer"])([weight], **options)
        after, norms = [], []
        for gradient in t["g"]:
            weight.grad = gradient.clone()
            bound = math.inf if params["max_norm"] is None else params["max_norm"]
            norms.append(float(torch.nn.utils.clip_grad_norm_([weight], bound)))
            optimizer.step()
            after.append(weight.detach().clone())
        return {"params_after": torch.stack(after), "total_norms": norms}

    yield Family("optimizers", "torch", "torch.optim.AdamW", draw, run)


def trl_families():
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    def draw_cpo(r):
        rows = r.int(1, 6)
        inputs = {f"policy_{side}_logps": r.uniform(-20, -0.01, rows) for side in ("chosen", "rejected")}
        params = {"loss_type": r.pick("sigmoid", "hinge", "ipo", "simpo"), "beta": r.pick(0.1, 2.0)}
        params |= {"label_smoothing": r.pick(0.0, 0.1), "simpo_gamma": r.pick(0.5, 1.6), "alpha": r.pick(0.0, 0.25)}
        return inputs, params

    def run_cpo(t, params):
        trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), **params)
        arrays = (t["policy_chosen_logps"], t["policy_rejected_logps"])
        losses, chosen, rejected = CPOTrainer.cpo_loss(trainer, *arrays)
        return {"losses": losses, "loss": losses.mean(), "chosen_rewards": chosen, "rejected_rewards": rejected}

    grads = ("policy_chosen_logps", "policy_rejected_logps")
    yield Family("cpo", "trl experimental/cpo", "CPOTrainer.cpo_loss", draw_cpo, run_cpo, grads=grads)

    def draw_jsd(r):
        shape = (r.int(1, 3), r.int(1, 4), r.int(2, 6))
        labels = r.g.integers(0, shape[2], shape[:2])
        labels[r.g.random(shape[:2]) < 0.3] = -100
        inputs = {"student_logits": r.normal(*shape, scale=3), "teacher_logits": r.normal(*shape, scale=3)}
        params = {"beta": r.pick(0.0, 0.1, 0.5, 0.9, 1.0), "temperature": r.pick(0.8, 1.0, 2.0)}
        return {**inputs, "labels": labels}, {**params, "reduction": r.pick("batchmean", "sum")}

    def run_jsd(t, params):
        arrays = (t["student_logits"], t["teacher_logits"], t["labels"])
        return {"loss": GKDTrainer.generalized_jsd_loss(*arrays, **params)}

    name = "GKDTrainer.generalized_jsd_loss"
    yield Family("jsd", "trl experimental/gkd", name, draw_jsd, run_jsd, grads=("student_logits",), ints=("labels",))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--temper", default="temper", help="the binary")
    parser.add_argument("--cases", type=int, default=100, help="cases per family")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("families", nargs="*", help="names to run; default: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for peer, families in (("torch", torch_families), ("trl", trl_families), ("verl", verl_families)):
        if peer == "verl":
            sys.meta_path.append(StubFinder())
        try:
            found = list(families())
        except ImportError as error:
            print(f"skipped {peer}: {error}")
            continue
        for family in found:
            if args.families and family.name not in args.families:
                continue
            agree, refused, wrong = compare(family, args.cases, args.seed, args.temper)
            print(f"{family.name}: {agree} agree, {refused} refused by both, {len(wrong)} differ")
            for document, difference in wrong[:3]:
                print(f"  {document['name']} {json.dumps(document['params'])}: {difference}")
            failed += len(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
