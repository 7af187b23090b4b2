"""What a recipe of `danlu train` asks of the planner."""

from __future__ import annotations

from pathlib import Path

from danlu.data.rows_settings import RowsSettings
from danlu.errors import DanluError
from danlu.model.checkpoint import StoredModel
from danlu.model.families.known import family_of
from danlu.plan.cluster import Cluster
from danlu.plan.describe import Written
from danlu.plan.plan import Plan, Work
from danlu.plan.search import Asked
from danlu.plan.shapes import of_config
from danlu.train.offloading.offload import OffloadSettings
from danlu.train.recipe import TrainRecipe


def ask_recipe(recipe: TrainRecipe, path: Path, gpus: str) -> tuple[Asked, Written, int]:
    """What a recipe trains, its own plan, and the tokens of the run.

    Args:
        path: of the recipe's file.
        gpus: the cluster, as `64xH100`.

    Raises DanluError where the cluster is none, the base cannot be read, or the size of the vocabulary is not said.
    """
    if recipe.model.base is not None:
        config = StoredModel.open(recipe.model.base).config
    else:
        learned = recipe.data.vocabulary
        keys = {**recipe.model.shape, "architectures": [recipe.model.architecture]}
        if learned is not None and learned.size is not None:
            keys.setdefault("vocab_size", learned.size)
        if "vocab_size" not in keys:
            fix = "say it: --set model.shape.vocab_size=32000"
            raise DanluError("how many words there are is known only once the data is read", where=path, fix=fix)
        config = family_of(keys, Path("model.architecture")).config(keys, Path("model.shape"))
    length = recipe.data.limit if isinstance(recipe.data, RowsSettings) else recipe.batch.window
    cluster, rows = Cluster.parse(gpus), recipe.own_rows
    precision = {"fp32": "fp32", "float8": "fp8"}.get(recipe.precision, "bf16")
    asked = Asked(of_config(config), cluster, length, rows, precision)
    set_besides = {
        "offload": recipe.offload != OffloadSettings(), "apart": recipe.apart is not None,
        "objective.teacher": recipe.objective.teacher is not None, "batch.growing": bool(recipe.batch.growing),
        f"optimizer.name={recipe.optimizer.name}": recipe.optimizer.name not in ("adam", "adamw"),
        f"optimizer.state={recipe.optimizer.state}": recipe.optimizer.state == "8bit",
        "optimizer.ema": recipe.optimizer.ema is not None, "optimizer.frozen": bool(recipe.optimizer.frozen),
        "plan.overlap": recipe.plan is not None and recipe.plan.overlap,
        "plan.schedule=zero-bubble": recipe.plan is not None and recipe.plan.schedule == "zero-bubble",
    }  # fmt: skip
    uncounted = tuple(name for name, is_set in set_besides.items() if is_set)
    own = recipe.plan or Plan(data=cluster.count)
    written = Written(str(path), own, recipe.recompute, Work(config, rows, length), uncounted)
    return asked, written, recipe.steps * rows * length
