"""Writes docs/api.md from docstrings: `python docs/make_api.py`.

Knows which names a user may import, and the syntax of Python; imports nothing of rlhf. A name of SURFACE that has no docstring, or is not there,
is an error, so that the page cannot name what does not exist.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"

SURFACE: dict[str, dict[str, tuple[str, ...]]] = {
    "The command from Python": {
        "rlhf.cli.api": ("run", "opened", "load", "compose"),
        "rlhf.cli.loop": ("Loop", "loop"),
        "rlhf.cli.assemble": ("Job",),
        "rlhf.cli.job": ("JobFailed",),
        "rlhf.config": ("UserError", "build", "locate"),
        "rlhf.rules": ("check",),
    },
    "What crosses between rooms": {
        "rlhf.types": ("TextBatch", "PairBatch", "RankedBatch", "PromptBatch", "Rollout", "Experience"),
    },
    "The arithmetic": {
        "rlhf.algorithms.advantages": ("shape_rewards", "gae", "rewards_to_go", "leave_one_out", "group_normalized", "RunningMoments"),
        "rlhf.algorithms.kl": ("kl_estimate", "kl_controller"),
        "rlhf.algorithms.logprobs": ("token_logprobs", "token_entropy", "logprobs_and_entropy"),
        "rlhf.algorithms.losses": (
            "policy_loss",
            "value_loss",
            "sft_loss",
            "pairwise_end_loss",
            "pairwise_token_loss",
            "explained_variance",
        ),
        "rlhf.algorithms.masked": ("masked_sum", "masked_mean", "whiten", "mean_weights"),
        "rlhf.algorithms.preference": ("answer_logprobs", "preference_loss"),
        "rlhf.algorithms.answers": ("answer_masks", "answer_scores", "shape_scores"),
        "rlhf.algorithms.mismatch": ("mismatch", "importance_weights"),
    },
    "Data": {
        "rlhf.data.datamodule": ("RLHFData",),
        "rlhf.data.sources": ("Source",),
        "rlhf.data.tokenizer": ("load_tokenizer", "end_of_turn_id"),
    },
    "Models": {
        "rlhf.models.factory": ("Blueprint", "build_network", "freeze"),
        "rlhf.models.networks": ("CausalLM", "ScalarModel"),
        "rlhf.models.export": ("export_network",),
        "rlhf.models.answering": ("load_policy", "load_judge"),
    },
    "What is learned": {
        "rlhf.modules.base": ("RoleModule", "step_metrics"),
        "rlhf.modules.sft": ("SFT",),
        "rlhf.modules.reward": ("RewardModel",),
        "rlhf.modules.dpo": ("DPO",),
        "rlhf.modules.ppo": ("PPO",),
        "rlhf.modules.critic_free": ("CriticFree",),
        "rlhf.modules.scorers": ("RewardFunction", "load_scorer"),
    },
    "Engines": {
        "rlhf.engines.config": ("EngineSpec", "Training"),
        "rlhf.engines.strategy": ("RoleStrategy", "StepResult"),
        "rlhf.engines.hybrid": ("HybridEngine",),
        "rlhf.engines.generation": ("RolloutEngine",),
    },
    "Fast answers": {
        "rlhf.inference.build": ("decoder_of",),
        "rlhf.inference.sampling": ("Sampling",),
        "rlhf.inference.generate": ("Generator", "Answers"),
        "rlhf.inference.service": ("Service", "Request", "Drawn", "Worker"),
        "rlhf.serving.answerer": ("Answerer", "Reply", "Piece"),
        "rlhf.serving.judge": ("Judge",),
    },
    "Before and after a run": {
        "rlhf.planning.report": ("report", "Report", "as_json"),
        "rlhf.reporting.files": ("write_report",),
        "rlhf.reporting.study": ("read_study", "Study"),
    },
}
"""Heading -> module -> public names."""

HOOKS = ("training_step", "validation_step", "configure_model", "configure_optimizers", "train", "forward", "setup", "connect", "teardown",
         "setup_environment", "model_sharded_context", "lightning_module_state_dict", "parallel_devices", "prepare", "state", "load_state",
         "evaluate_batch", "summarize", "state_dict", "load_state_dict", "train_dataloader", "val_dataloader")  # fmt: skip
"""Methods that Lightning, PyTorch or this project's callbacks call. One without a docstring does what its name says there, and is left out."""

INTRODUCTION = """\
# The Python API

Made by `docs/make_api.py` from docstrings; change those, then run it. These are the names that a program of yours may import; the rest of the
house may change without a word. [own_pipeline.md](own_pipeline.md) shows them at work, [architecture.md](architecture.md) says who may import whom.
B rows of this rank, P prompt tokens, A answer tokens, T = P + A, V words of the vocabulary.
"""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file as syntax."""

    name: str
    tree: ast.Module
    lines: list[str]

    def definition(self, name: str) -> Function | ast.ClassDef:
        for node in self.tree.body:
            if isinstance(node, Function | ast.ClassDef) and node.name == name:
                return node
        raise LookupError(f"{self.name} has no {name}")

    def comment(self, node: ast.stmt) -> str:
        """What stands behind a field in its line."""
        return self.lines[node.lineno - 1][node.end_col_offset or 0 :].partition("#")[2].strip()


def render() -> str:
    """The whole page.

    Raises:
        LookupError: a name is not there, or has no docstring.
    """
    parts = [INTRODUCTION]
    for heading, modules in SURFACE.items():
        parts.append(f"## {heading}\n")
        for name, names in modules.items():
            module = read(name)
            parts += [f"### `{name}`\n", first_paragraph(documented(module.tree, name)) + "\n"]
            for public in names:
                parts += describe(module, module.definition(public))
    return "\n".join(parts).rstrip() + "\n"


def read(name: str) -> Module:
    source = (ROOT / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    return Module(name, ast.parse(source), source.splitlines())


# --- names ---------------------------------------------------------------------------------------------------------------------


def describe(module: Module, node: Function | ast.ClassDef) -> Iterator[str]:
    yield f"#### `{node.name}`\n"
    if isinstance(node, Function):
        yield code(signature(node, node.name))
        yield text_of(documented(node, f"{module.name}.{node.name}"))
        return
    initial = next((part for part in node.body if isinstance(part, Function) and part.name == "__init__"), None)
    fields = [part for part, following in zip(node.body, [*node.body[1:], None], strict=True) if is_field(part, following)]
    constructed = initial is not None and not any(name in ast.unparse(base) for base in node.bases for name in ("Exception", "Thread"))
    yield code(signature(initial, node.name) if constructed and initial is not None else f"class {node.name}{bases(node)}")
    yield text_of(documented(node, f"{module.name}.{node.name}"))
    if constructed and initial is not None and ast.get_docstring(initial):
        yield text_of(ast.get_docstring(initial) or "")
    if fields:
        yield table_of(module, node, fields)
    for method in node.body:
        if isinstance(method, Function) and not method.name.startswith("_") and not is_setter(method):
            yield from describe_method(module, node.name, method)


def describe_method(module: Module, owner: str, method: Function) -> Iterator[str]:
    if method.name in HOOKS and not ast.get_docstring(method):
        return
    said = text_of(documented(method, f"{module.name}.{owner}.{method.name}"))
    if any(ast.unparse(one) == "property" for one in method.decorator_list):
        kind = f": {ast.unparse(method.returns)}" if method.returns is not None else ""
        yield f"**`{owner}.{method.name}`** (property`{kind}`)\n" if kind else f"**`{owner}.{method.name}`** (property)\n"
    else:
        yield f"**`{signature(method, f'{owner}.{method.name}')}`**\n"
    yield said


def is_field(part: ast.stmt, following: ast.stmt | None) -> bool:
    """An attribute that a user gives or reads; one of the class itself only where it says what it means."""
    named = isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and not part.target.id.startswith("_")
    return named and ("ClassVar" not in ast.unparse(part) or bool(docstring_behind(following)))


def is_setter(method: Function) -> bool:
    return any(ast.unparse(one).endswith(".setter") for one in method.decorator_list)


def bases(node: ast.ClassDef) -> str:
    names = [ast.unparse(base) for base in node.bases if ast.unparse(base) not in ("Rows", "NamedTuple", "Protocol")]
    return f"({', '.join(names)})" if names else ""


def signature(function: Function, name: str) -> str:
    """The call in one line, `self` left out. A context manager says what `with` gives."""
    arguments = ast.unparse(function.args)
    arguments = re.sub(r"^(self|cls)(, )?", "", arguments)
    returns = f" -> {ast.unparse(function.returns)}" if function.returns is not None and function.name != "__init__" else ""
    if any(ast.unparse(one) == "contextmanager" for one in function.decorator_list):
        return f"with {name}({arguments}) as {returns.removeprefix(' -> Iterator[').removesuffix(']')}"
    return f"{name}({arguments}){returns}"


def table_of(module: Module, node: ast.ClassDef, fields: list[ast.AnnAssign]) -> str:
    lines = ["| field | type | |", "| --- | --- | --- |"]
    for field in fields:
        following = node.body[node.body.index(field) + 1] if field is not node.body[-1] else None
        said = "; ".join(part for part in (module.comment(field).partition("type: ignore")[0], docstring_behind(following)) if part)
        kind = ast.unparse(field.annotation).replace("|", "\\|")
        cells = (f"`{ast.unparse(field.target)}`", f"`{kind}`", " ".join(said.split()).replace("|", "\\|"))
        lines.append(("| " + " | ".join(cells)).rstrip() + " |")
    return "\n".join(lines) + "\n"


def docstring_behind(node: ast.stmt | None) -> str:
    value = node.value if isinstance(node, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


# --- texts ---------------------------------------------------------------------------------------------------------------------


def documented(node: ast.Module | ast.ClassDef | Function, name: str) -> str:
    text = ast.get_docstring(node)
    if not text or SECTION.match(text.splitlines()[0]):
        raise LookupError(f"{name} is on the page of the API and has no docstring that says what it is")
    return text


def first_paragraph(text: str) -> str:
    """Of a module's docstring, without what it says of what it knows."""
    return " ".join(text.split("\n\n")[0].split())


SECTION = re.compile(r"^(Args|Returns|Raises|Attributes):$")


def text_of(docstring: str) -> str:
    """A docstring as Markdown: paragraphs joined, its sections as lists."""
    parts: list[str] = []
    for block in docstring.split("\n\n"):
        heading, *rest = block.splitlines()
        found = SECTION.match(heading.strip())
        if found is None:
            parts.append(" ".join(block.split()))
        elif found.group(1) == "Returns":
            parts.append("*Returns* " + " ".join(" ".join(rest).split()))
        else:
            parts.append("\n".join([f"*{found.group(1)}*", "", *items(rest)]))
    return "\n\n".join(parts) + "\n"


def items(lines: list[str]) -> Iterator[str]:
    """`name: text` with continuation lines -> items of a list."""
    indent = min(len(line) - len(line.lstrip()) for line in lines)
    entries: list[str] = []
    for line in lines:
        if len(line) - len(line.lstrip()) == indent and re.match(r"[\w*, ]+:", line.strip()):
            entries.append(line.strip())
        elif entries:
            entries[-1] += " " + line.strip()
        else:
            entries.append(line.strip())
    for entry in entries:
        name, colon, said = entry.partition(":")
        yield f"- `{name}`: {said.strip()}" if colon else f"- {entry}"


def code(line: str) -> str:
    return f"```python\n{line}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
