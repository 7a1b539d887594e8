"""Does a profile before training say which rules will learn?

Profiles the networks of three committed results, at their initial weights, and compares the gradient angles
with the errors that training gave: EfficientNet-Lite0 fine-tuned on CIFAR-10 (results/finetune), the paper's
network on Flowers17 (results/liao2016/flowers17), and the character transformer (results/characters).

    python analysis/profiles.py --root data --cifar10 imagefolder:data/cifar10

`root` holds flowers-17. Writes profiles.csv, conditions.csv, profile.png and README.md; an experiment that is
in profiles.csv already is not profiled again.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jinja2 import Environment, StrictUndefined
from jsonargparse import auto_cli
from matplotlib.figure import Figure

import feedbackhook
from feedbackhook.diagnosis.profiled import HALF, TENTH, Profile
from feedbackhook.experiments.config import DataConfig
from feedbackhook.experiments.profiling import ProfileConfig
from feedbackhook.experiments.profiling import profile as profile_config
from feedbackhook.report import theme

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TITLES = {
    "finetune": "EfficientNet-Lite0, fine-tuned on CIFAR-10",
    "flowers17": "Flowers17, the paper's network",
    "characters": "character transformer",
}
ERRORS = {
    "finetune": "test error [%], mean of 3 seeds",
    "flowers17": "best test error [%]",
    "characters": "test loss [bits per character]",
}
THREADS = 1


def profile_finetune(root: Path, cifar10: str) -> pd.DataFrame:
    """Profile the pretrained network as recipes/retrofit/finetune.yaml trains it: whole, 50 images at 96
    pixels."""
    images = DataConfig(cifar10, root=str(root), size=96, train_images=2000, test_images=100)
    config = ProfileConfig(
        "timm/tf_efficientnet_lite0", images, weights="package", batch_size=50, threads=THREADS
    )
    return _rows(profile_config(config), {})


def profile_flowers17(root: Path, cifar10: str) -> pd.DataFrame:
    """Profile the paper's network, without Batch Normalization and with it."""
    plain = ProfileConfig(
        "liao2016/images",
        DataConfig("Flowers17", root=str(root)),
        modes=["uSF", "NuSF", "RndF"],
        batch_size=32,
        threads=THREADS,
    )
    normalized = replace(
        plain, batch_norm="paper", modes=["uSF", "brSF", "frSF", "RndF"], concordances=[1.0, 0.5]
    )
    names = {
        f"{rule}, concordance {c:g}": f"{rule}+BN+BM concordance={c:g}"
        for rule in ("brSF", "frSF")
        for c in (1.0, 0.5)
    }
    with_norm = _rows(profile_config(normalized), names | {"uSF": "uSF+BN+BM", "RndF": "RndF+BN+BM"})
    return pd.concat([_rows(profile_config(plain), {}), with_norm])


def profile_characters(root: Path, cifar10: str) -> pd.DataFrame:
    """Profile the transformer of recipes/retrofit/characters.py, with its rules and its batches."""
    sys.path.insert(0, str(HERE.parent / "recipes" / "retrofit"))
    from characters import RULES
    from characters_model import CharacterTransformer
    from characters_text import alphabet, encode, shipped_text, split

    text = shipped_text()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = CharacterTransformer(len(alphabet(text)), blocks=3, width=64, heads=4, context=64)
    training = encode(split(text)[0], alphabet(text))
    starts = torch.randint(len(training) - 64, (2, 16, 1), generator=torch.Generator().manual_seed(0))
    windows = [training[start + torch.arange(65)] for start in starts]
    found = feedbackhook.profile(
        model,
        [(window[:, :-1], window[:, 1:].flatten()) for window in windows],
        lambda scores, target: torch.nn.functional.cross_entropy(scores.flatten(0, 1), target),
        modes={rule: arguments for rule, arguments in RULES.items() if arguments is not None},
    )
    return _rows(found, {f"sign {c}, concordance {c}": f"sign {c}" for c in ("1", "0.75", "0.5")})


PROFILES = {
    "finetune": profile_finetune,
    "flowers17": profile_flowers17,
    "characters": profile_characters,
}


def errors_of(experiment: str) -> pd.Series:
    """Return what training gave, by condition."""
    if experiment == "finetune":
        runs = pd.read_csv(RESULTS / "finetune" / "runs.csv")
        means = runs[runs["trainable"] == "whole"].groupby("condition")["last_error"].mean()
        return means.rename(lambda name: name.replace("sign, concordance 1.0", "sign, concordance 1"))
    if experiment == "flowers17":
        return pd.read_csv(RESULTS / "liao2016" / "flowers17" / "table.csv").set_index("condition")[
            "best_error"
        ]
    runs = pd.read_csv(RESULTS / "characters" / "runs.csv")
    return runs[runs["chosen"]].set_index("rule")["test_bits"]


def controls_of(experiment: str) -> dict[str, float]:
    """Return the errors of backprop and of the classifier alone, where the result has them."""
    errors = errors_of(experiment)
    found = {"backprop": errors.get("backprop", errors.get("SGD"))}
    if experiment == "finetune":
        runs = pd.read_csv(RESULTS / "finetune" / "runs.csv")
        found["classifier alone"] = runs.loc[runs["trainable"] == "head", "last_error"].mean()
    elif "BN+BM" in errors:
        found["backprop, BN+BM"] = errors["BN+BM"]
    elif "head alone" in errors:
        found["classifier alone"] = errors["head alone"]
    return {name: float(value) for name, value in found.items()}


def conditions(profiles: pd.DataFrame) -> pd.DataFrame:
    """Return, for each experiment and condition, angles of the profile beside the error that training gave.

    `mean_angle` is over the layers but the one nearest to the output, whose gradient is always backprop's;
    `first_angle` is that of the layer nearest to the input.
    """
    rows = []
    for (experiment, condition), part in profiles.groupby(["experiment", "condition"], sort=False):
        angles = part.dropna(subset="mean").sort_values("depth")["mean"]
        rows.append(
            {
                "experiment": experiment,
                "condition": condition,
                "mean_angle": angles.iloc[:-1].mean(),
                "first_angle": angles.iloc[0],
                "below_60": int((angles[::-1] < HALF).cumprod().sum()),
                "below_85": int((angles[::-1] < TENTH).cumprod().sum()),
                "layers": len(angles),
                "error": errors_of(str(experiment)).get(condition),
            }
        )
    return pd.DataFrame(rows)


def correlations(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return Spearman's rank correlation of the mean angle with the error over conditions, with its p value
    from permutations, for each experiment."""
    from scipy.stats import permutation_test, spearmanr

    found = {}
    for experiment, part in table.dropna(subset="error").groupby("experiment", sort=False):
        angles, errors = part["mean_angle"].to_numpy(), part["error"].to_numpy()
        test = permutation_test(
            (angles,),
            lambda x, errors=errors: spearmanr(x, errors).statistic,
            permutation_type="pairings",
            n_resamples=9999,
            rng=0,
        )
        found[str(experiment)] = {
            "rho": float(test.statistic),
            "p": float(test.pvalue),
            "count": len(part),
        }
    return found


def measured_in_training() -> pd.DataFrame:
    """Return the gradient angles that results/finetune measured before the first update, by condition and
    layer."""
    angles = pd.read_csv(RESULTS / "finetune" / "angles.csv")
    start = angles[
        (angles["trainable"] == "whole") & (angles["metric"] == "gradient_angle") & (angles["step"] == 0)
    ]
    return start.set_index(["condition", "layer"])["value"].dropna()


def draw(table: pd.DataFrame, found: dict[str, dict[str, Any]]) -> Figure:
    """Draw error against mean profile angle, a panel for each experiment."""
    with theme.style():
        figure = Figure(figsize=theme.figsize(14.0, 4.8), layout="constrained")
        for axes, (experiment, part) in zip(
            figure.subplots(1, 3), table.groupby("experiment", sort=False), strict=True
        ):
            names = list(part["condition"])
            palette = dict(zip(names, theme.sequence(len(names)), strict=True))
            markers = "osD^vPX*<>"
            for number, row in enumerate(part.to_dict("records")):
                axes.scatter(
                    row["mean_angle"],
                    row["error"],
                    color=palette[row["condition"]],
                    marker=markers[number % len(markers)],
                    s=60,
                    label=row["condition"],
                )
            for (name, error), style in zip(controls_of(str(experiment)).items(), (":", "--"), strict=False):
                axes.axhline(error, linestyle=style, color=theme.ink(), linewidth=1, label=name)
            rho = found[str(experiment)]
            axes.set(
                xlabel="mean gradient angle before training [°]",
                ylabel=ERRORS[str(experiment)],
                title=f"{TITLES[str(experiment)]}\nrank correlation {rho['rho']:.2f}",
            )
            axes.title.set_fontsize("medium")
            axes.legend(frameon=False, fontsize="x-small", loc="best")
    return figure


def main(root: Path = Path("data"), cifar10: str = "CIFAR10", output: Path = RESULTS / "profile") -> None:
    """Profile, compare, and write the page.

    Args:
        root: the folder that holds flowers-17.
        cifar10: CIFAR-10 as `data.name` takes it.
        output: folder for the page.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = output / "profiles.csv"
    profiles = pd.read_csv(file) if file.exists() else pd.DataFrame({"experiment": []})
    for experiment, run in PROFILES.items():
        if experiment in set(profiles["experiment"]):
            continue
        began = time.process_time()
        rows = run(root, cifar10).assign(experiment=experiment, seconds=round(time.process_time() - began, 1))
        profiles = pd.concat([profiles, rows])
        profiles.to_csv(file, index=False, float_format="%.2f")
        print(f"{experiment}: {time.process_time() - began:.0f} s of processor time", flush=True)
    profiles = pd.read_csv(file)  # so that a page made again has the same numbers
    table = conditions(profiles)
    found = correlations(table)
    table.to_csv(output / "conditions.csv", index=False, float_format="%.2f")
    draw(table, found).savefig(output / "profile.png", dpi=150)
    own = profiles[profiles["experiment"] == "finetune"].set_index(["condition", "layer"])["mean"].dropna()
    both = pd.concat([own.rename("profile"), measured_in_training().rename("measured")], axis=1).dropna()
    source = (HERE / "profiles.md.jinja").read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    text = environment.from_string(source).render(
        table=table,
        found=found,
        titles=TITLES,
        errors=ERRORS,
        controls={name: controls_of(name) for name in TITLES},
        seconds=profiles.groupby("experiment")["seconds"].first().to_dict(),
        both=both,
        difference=(both["profile"] - both["measured"]).abs(),
        torch=torch.__version__,
    )
    (output / "README.md").write_text(text, encoding="utf-8")
    print(*(output / name for name in ("README.md", "conditions.csv", "profile.png")), sep="\n")


def _rows(profile: Profile, names: dict[str, str]) -> pd.DataFrame:
    """Return the gradient angles of a profile, with the names of the result's conditions."""
    table = profile.table()
    angles = table[table["metric"] == "gradient_angle"]
    angles = angles.assign(condition=angles["condition"].map(lambda name: names.get(name, name)))
    return angles[["condition", "layer", "depth", "mean", "std", "defined"]]


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
