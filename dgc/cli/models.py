"""The user's model: a function of a script, a list of shapes, or a published network by its name."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .ranks import UsageError
from .shapes import NETWORKS, Shapes

Loss = Callable[[nn.Module], Tensor]
FORMS = (
    "a function (train.py:make_model or package.module:function), shapes (1024x1024,1024 or a file of such), or one of "
    + ", ".join(NETWORKS)
)


@dataclass(frozen=True)
class Model:
    """What is to be trained."""

    name: str
    shapes: Shapes
    """Of the trainable parameters."""
    module: nn.Module | None = None
    loss: Loss | None = None
    """Runs the module on this rank's data; None where gradients have to be made up."""

    @property
    def parameters(self) -> int:
        """Elements of all trainable parameters."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def digest(self) -> str:
        """A text that differs where names or shapes do."""
        written = hashlib.sha256(json.dumps(list(self.shapes.items())).encode()).hexdigest()[:12]
        return f"{len(self.shapes)} parameters of {self.parameters:,} elements ({written})"


def load(text: str) -> Model:
    """Returns the model that the command line names.

    Raises:
        UsageError: it can be read in none of the forms, or the function fails.
    """
    if name := next((known for known in NETWORKS if _plain(known) == _plain(text)), None):
        return Model(name, NETWORKS[name]())
    if ":" in text:
        return _of_function(text)
    path = Path(text)
    if path.is_file():
        return Model(path.stem, parse_shapes(path.read_text(), text))
    if re.match(r"^\s*[\[\d]", text):
        return Model("shapes", parse_shapes(text, "--model"))
    raise UsageError(f"--model: expected {FORMS}; got {text!r}")


def parse_shapes(text: str, where: str) -> Shapes:
    """Returns shapes, numbered: 1024x1024 each, parted by commas or spaces, a name and a colon in front where wanted.

    JSON, a list of lists or an object of names and lists, is taken too. What follows # in a line is a comment.

    Raises:
        UsageError: one cannot be read.
    """
    if text.lstrip().startswith(("[", "{")):
        try:
            read = json.loads(text)
            named = read.items() if isinstance(read, dict) else ((str(i), shape) for i, shape in enumerate(read))
            written = [(name, "x".join(str(n) for n in shape)) for name, shape in named]
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"{where}: expected shapes as JSON, [[1024, 1024], [1024]], got what cannot be read: {error}"
            ) from error
    else:
        words = re.sub(r"#.*", "", text).replace(",", " ").split()
        written = [(name or str(i), shape) for i, (name, _, shape) in enumerate(word.rpartition(":") for word in words)]
    shapes: Shapes = {}
    for name, shape in written:
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
            raise UsageError(f"{where}: expected shapes such as 1024x1024 or 1024, got {shape!r}: mend it")
        shapes[name if name not in shapes else f"{name}.{len(shapes)}"] = tuple(int(n) for n in shape.split("x"))
    if not shapes:
        raise UsageError(f"{where}: expected shapes such as 1024x1024,1024, got none")
    return shapes


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _of_function(text: str) -> Model:
    source, _, name = text.rpartition(":")
    try:
        made = getattr(_imported(source), name)()
    except Exception as error:
        raise UsageError(
            f"--model: expected a function without arguments that returns a module, or a module and its loss, got "
            f"{type(error).__name__} from {text}: {error}"
        ) from error
    module, loss = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module) or not (loss is None or callable(loss)):
        raise UsageError(
            f"--model: expected {text} to return a torch.nn.Module, or (module, loss) with loss(module) a scalar, got "
            f"{type(made).__name__}"
        )
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
    if not shapes:
        raise UsageError(f"--model: expected trainable parameters in the module of {text}, got none")
    return Model(text, shapes, module, loss)


def _imported(source: str) -> Any:
    if not source.endswith(".py"):
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(source)
    path = Path(source).resolve()
    sys.path.insert(0, str(path.parent))  # as for a script
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[path.stem] = module
    found.loader.exec_module(module)
    return module


class _Given(torch.autograd.Function):
    """A number whose gradients are those that it is given."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        """Returns 0."""
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        """Returns copies, since .grad takes over what it gets."""
        return None, *(gradient.clone() for gradient in ctx.gradients)


class Fake(nn.Module):
    """Parameters of given shapes, whose gradients are random numbers: nothing is computed."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        """Makes parameters and gradients."""
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes.values())
        self.gradients = [torch.randn(shape, device=device) for shape in shapes.values()]

    def forward(self) -> Tensor:
        """Returns a number to call backward() on."""
        loss: Tensor = _Given.apply(self.gradients, *self.weights)  # type: ignore[no-untyped-call]
        return loss


def trained(model: Model, device: torch.device) -> tuple[nn.Module, Loss]:
    """Returns a module on a device, and its loss: the user's, or one with made-up gradients."""
    if model.module is not None and model.loss is not None:
        return model.module.to(device), model.loss
    return Fake(model.shapes, device), lambda module: module()
