"""Who may import whom in the package, read from its files: nothing else keeps the plan of docs/architecture.md."""

import ast
from pathlib import Path

import balcap_jax

PACKAGE = Path(balcap_jax.__file__).parent
COMMANDS = {"train", "caption", "convert", "recaption", "evaluate", "compare"}
# Longest name first: what a module inside a part may do that the part may not. Any part may import itself and `cli`.
MAY_IMPORT = {
    "judges.mesh_judge": {"data", "parallel", "config.schema", "models", "rollout"},
    "cli": set(),
    "advantages": set(),
    "losses": set(),
    "config": set(),
    "parallel": set(),
    "data": set(),
    "models": {"parallel", "losses", "config.schema"},
    "rollout": {"models", "advantages", "losses", "parallel", "staging", "refill", "drawing"},
    "refill": {"models", "parallel", "drawing"},
    "drawing": set(),
    "staging": set(),
    "train_step": {"models", "advantages", "losses", "parallel"},
    "judges": {"data", "parallel", "config.schema"},
    "rewards": {"judges", "data"},
    "report": {"judges.schema", "data.scenes.habits"},
    "evals": {"judges", "data", "rewards.base", "rewards.balcap", "rewards.bcapscore"},
    "captioning": {"data", "models", "rollout", "parallel", "config.schema"},
    "training": {
        "config",
        "parallel",
        "data",
        "models",
        "judges",
        "rewards",
        "train_step",
        "rollout",
        "refill",
        "advantages",
    },
    "aot": {"training.programs", "models", "parallel", "config"},
    "ablate": {"training", "report", "config", "rewards", "judges.cost"},
    "doctor": {"training", "models", "data", "rewards", "judges", "parallel", "config"},
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


# An installed package also holds the recipes, which are nobody's modules.
MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(PACKAGE / "configs")}


def imports() -> dict[str, set[str]]:
    """{module: modules of ours that it imports}, those inside functions too."""
    found = {}
    for module, path in MODULES.items():
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {name for node in nodes for name in ([node.module] if isinstance(node, ast.ImportFrom) else [])}
        assert not any(node.level for node in nodes if isinstance(node, ast.ImportFrom)), f"{module}: a relative import"
        found[module] = set()
        for node in nodes:
            base = getattr(node, "module", None)
            names = [f"{base}.{a.name}" for a in node.names] if base else [a.name for a in node.names]
            for name in names:
                name = name.removeprefix("balcap_jax").lstrip(".") if name.startswith("balcap_jax") else None
                if name is not None:
                    found[module].add(name if name in MODULES else name.rpartition(".")[0])
    return found


def is_in(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


def is_allowed(module: str, target: str) -> bool:
    part = module.partition(".")[0]
    if is_in(target, part) or is_in(target, "cli") or target == "":
        return True
    if part in COMMANDS or module.endswith("__main__"):
        return target not in COMMANDS and not target.endswith("__main__")
    rules = next(allowed for name, allowed in MAY_IMPORT.items() if is_in(module, name))
    return any(is_in(target, allowed) for allowed in rules)


def test_imports_keep_the_table():
    arrows = {(module, target) for module, targets in imports().items() for target in targets if module}
    assert {arrow for arrow in arrows if not is_allowed(*arrow)} == set()


def test_imports_make_no_circle():
    """A package's `__init__` and what it gathers count as two."""
    waiting = {module: {t for t in targets if t != module} for module, targets in imports().items()}
    while free := [module for module, targets in waiting.items() if not targets & set(waiting)]:
        for module in free:
            del waiting[module]
    while idle := [module for module in waiting if not any(module in targets for targets in waiting.values())]:
        for module in idle:
            del waiting[module]
    assert not waiting


def test_no_file_is_longer_than_500_lines():
    assert [name for name, path in MODULES.items() if len(path.read_text().splitlines()) > 500] == []
