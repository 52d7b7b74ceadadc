"""The command line: `steploop train`, `sample`, `compare`, `convert`, `explain`, `doctor`.

What a command needs is imported inside it: `steploop --help` answers at once, and works without the extras
that only another command uses.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import enum
import errno
import importlib.util
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .errors import DataError, InputError, SteploopError, raised_at

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError:  # told by main(): this module can be imported without them
    typer = None

if TYPE_CHECKING:
    from .recipes.charlm import Shape
    from .recipes.charlm_training import Settings

EXTRAS = 'pip install "steploop[recipes]"'
OF_EXTRAS = ("lightning", "matplotlib", "tensorboard", "rich", "safetensors", "rapidfuzz")


class Cell(str, enum.Enum):
    gru = "gru"
    lstm = "lstm"


class Device(str, enum.Enum):
    cpu = "cpu"
    cuda = "cuda"


class Backend(str, enum.Enum):
    auto = "auto"
    cpu = "cpu"
    eager = "eager"
    reference = "reference"


def main(arguments: Sequence[str] | None = None) -> None:
    """The program `steploop`. Exit code 2 with a message, not a traceback, for what the user can mend."""
    if typer is None:
        sys.exit(_complain(f"The command line needs more packages.\n  fix:      {EXTRAS}"))
    try:
        _application()(args=arguments, prog_name="steploop")
    except SteploopError as error:
        sys.exit(_complain(str(error)))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in OF_EXTRAS:
            raise
        sys.exit(_complain(f"This command needs the package {error.name}.\n  fix:      {EXTRAS}"))
    except OSError as error:
        sys.exit(_complain(_of_a_file(error)))
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error):
            raise
        sys.exit(_complain("A checkpoint could not be written.\n  fix:      free space where --out is, then --resume"))


def _of_a_file(error: OSError) -> str:
    named = f": {error.filename}" if error.filename else ""
    what = "free space there, then --resume" if error.errno == errno.ENOSPC else "another --out, or its permissions"
    return f"{error.strerror or str(error) or type(error).__name__}{named}\n  fix:      {what}"


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _application() -> typer.Typer:
    from . import cli_g2p

    app = typer.Typer(
        help="Write one time step in plain PyTorch; run the whole sequence at once.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    recipes = typer.Typer(help="Train a model.", no_args_is_help=True)
    recipes.command("charlm")(train_charlm)
    app.add_typer(recipes, name="train")
    cli_g2p.register(app, recipes)
    conversions = typer.Typer(help="Convert checkpoints of other frameworks.", no_args_is_help=True)
    conversions.callback()(lambda: None)
    conversions.command("tf1")(convert_tf1)
    app.add_typer(conversions, name="convert")
    for command in (sample, compare, explain, doctor):
        app.command()(command)
    return app


# --- train, compare ---------------------------------------------------------------------------------------



def _finite(value: float | None) -> float | None:
    """A typer callback: nan and inf pass every other check."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"a finite number is expected; got {value}")
    return value


if typer is not None:
    Data = Annotated[Path | None, typer.Option(help="A UTF-8 text; without it, the Shakespeare texts.")]
    Streams = Annotated[int, typer.Option(min=1, help="Places of the text that are read side by side (B).")]
    Steps = Annotated[
        int, typer.Option(min=1, help="Characters per window; gradients stop at its border (T).")
    ]
    Rate = Annotated[float, typer.Option(callback=_finite, help="The highest learning rate of the run.")]
    Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the weights, dropout and windows.")]
    UsedBackend = Annotated[Backend, typer.Option(help="What runs the loops.")]
    UsedDevice = Annotated[Device, typer.Option(help="Where the model is trained.")]
    Overwrite = Annotated[bool, typer.Option("--overwrite", help="A model that is in --out may be replaced.")]


def train_charlm(
    data: Data = None,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Checkpoints, logs and the curve go here.")
    ] = Path("runs/charlm"),
    cell: Annotated[Cell | None, typer.Option(help="[default: gru]")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="[default: 2]")] = None,
    units: Annotated[int | None, typer.Option(min=1, help="Per layer. [default: 256]")] = None,
    embedding: Annotated[int | None, typer.Option(min=1, help="[default: 128]")] = None,
    dropout: Annotated[float | None, typer.Option(min=0, max=0.99, callback=_finite, help="[default: 0.1]")] = None,
    streams: Streams = 64,
    steps: Steps = 64,
    learning_rate: Rate = 4e-3,
    minutes: Annotated[
        float | None, typer.Option(callback=_finite, help="[default: 9, or none with --max-steps]")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Windows to train on, instead of a time.")] = None,
    seed: Seed = 1,
    backend: UsedBackend = Backend.auto,
    device: UsedDevice = Device.cpu,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a character model: it learns to continue a text, one character at a time.

    The first 90 % of the text are for training, the last 10 % tell how good the model is. The learning rate
    falls towards the end of --minutes (or --max-steps); on --resume these count from the very beginning.
    """
    if resume and overwrite:
        raise DataError("--resume keeps the model that --overwrite would replace: give one of them.")
    text = _text(data)
    from .recipes.charlm_training import Settings, fit
    from .recipes.training import BEST, LAST

    given = dict(cell=cell and cell.value, layers=layers, units=units, embedding=embedding, dropout=dropout)
    shape = dataclasses.replace(
        _shape_to_begin_with(out / LAST if resume else None),
        **{name: value for name, value in given.items() if value is not None},
    )
    settings = Settings(
        streams,
        steps,
        learning_rate,
        _minutes(minutes, max_steps, 9.0),
        max_steps,
        seed=seed,
        backend=backend.value,
        device=device.value,
    )
    console = Console()
    console.print(f"{shape}; {len(text):,} characters; {_budget(settings)}.", highlight=False)
    module = fit(text, shape, settings, out, resume=resume, overwrite=overwrite, console=console)
    best = min(module.history, key=lambda entry: entry["val_nats"])
    console.print(
        f"Best validation loss: {best['val_nats']:.4f} nats = {best['val_bits_per_character']:.4f} bits per "
        f"character.\n  checkpoints  {out / BEST}, {out / LAST}\n  curve        {out / 'curve.png'}\n"
        f"  plan         {out / 'plan.txt'}, {out / 'plan.html'}\n"
        f"  logs         {out / 'logs'}, {out / 'tensorboard'}\n"
        f'Try it:  steploop sample --checkpoint {out / BEST} --prompt "..."',
        highlight=False,
        soft_wrap=True,
    )


def compare(
    data: Data = None,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="One folder per model, and compare.png.")
    ] = Path("runs/compare"),
    cell: Annotated[Cell, typer.Option()] = Cell.gru,
    layers: Annotated[str, typer.Option(help="Numbers of layers to try.")] = "1,2,3",
    units: Annotated[str, typer.Option(help="Numbers of units to try.")] = "128,256",
    embedding: Annotated[int, typer.Option(min=1)] = 128,
    dropout: Annotated[float, typer.Option(min=0, max=0.99, callback=_finite)] = 0.1,
    streams: Streams = 64,
    steps: Steps = 64,
    learning_rate: Rate = 4e-3,
    minutes: Annotated[
        float | None,
        typer.Option(callback=_finite, help="For each model. [default: 1, or none with --characters]"),
    ] = None,
    characters: Annotated[
        int | None, typer.Option(min=1, help="Characters that each model reads, instead of a time.")
    ] = None,
    seed: Seed = 1,
    backend: UsedBackend = Backend.auto,
    device: UsedDevice = Device.cpu,
    overwrite: Overwrite = False,
) -> None:
    """Train a sweep of layers x units, each with the same budget: which model is better, do more layers help?

    The same --minutes ask what is best for your time; the same --characters, what is best for your text.
    """
    text = _text(data)
    from .recipes.charlm import Shape
    from .recipes.charlm_compare import compare as run
    from .recipes.charlm_training import Settings

    max_steps = None if characters is None else max(1, characters // (streams * steps))
    settings = Settings(
        streams,
        steps,
        learning_rate,
        _minutes(minutes, max_steps, 1.0),
        max_steps,
        seed=seed,
        backend=backend.value,
        device=device.value,
    )
    base = Shape(cell.value, embedding=embedding, dropout=dropout)
    console = Console()
    run(
        text, base, _numbers(layers, "--layers"), _numbers(units, "--units"), settings, out,
        overwrite=overwrite, console=console,
    )  # fmt: skip
    console.print(f"Curves: {out / 'compare.png'}", soft_wrap=True, highlight=False)


def _text(data: Path | None) -> str:
    from .recipes import texts

    return texts.shakespeare() if data is None else texts.read(data)


def _shape_to_begin_with(checkpoint: Path | None) -> Shape:
    """A resumed model keeps its shape: nobody should have to type it again."""
    from .recipes.charlm import Checkpoint, Shape

    return Shape() if checkpoint is None else Checkpoint.read(checkpoint).shape


def _minutes(minutes: float | None, max_steps: int | None, default: float) -> float | None:
    return default if minutes is None and max_steps is None else minutes


def _budget(settings: Settings) -> str:
    parts = [] if settings.minutes is None else [f"{settings.minutes:g} minutes"]
    parts += [] if settings.max_steps is None else [f"{settings.max_steps} steps"]
    return "at most " + " or ".join(parts)


def _numbers(listed: str, option: str) -> list[int]:
    """[1, 2, 3] from "1,2,3"."""
    try:
        numbers = [int(part) for part in listed.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise DataError(f"{option} is a list of numbers such as 1,2,3; got {listed!r}")
    return numbers


# --- sample -----------------------------------------------------------------------------------------------


def sample(
    checkpoint: Annotated[Path, typer.Option(help="What `train charlm` wrote.")] = Path(
        "runs/charlm/best.ckpt"
    ),
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "\n",
    length: Annotated[int, typer.Option(min=0, help="Characters to write.")] = 500,
    temperature: Annotated[
        float, typer.Option(callback=_finite, help="Below 1 bolder, above 1 wilder; 0: always the likeliest.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest only; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(callback=_finite, help="Draw from the likeliest with this probability together.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The same seed writes the same text. [default: random]")
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option("--interactive", help="Read a prompt per line of input; what was said is remembered."),
    ] = False,
    backend: UsedBackend = Backend.auto,
) -> None:
    """Continue a prompt, character by character."""
    import torch

    from .recipes.charlm import Checkpoint, Choice, Writer

    trained = Checkpoint.read(checkpoint)
    choice = Choice(temperature, top_k, top_p)
    model = trained.model(backend.value)
    writer = Writer(model, trained.vocabulary, choice, torch.seed() % 2**31 if seed is None else seed)
    with _one_thread():
        if interactive:
            _converse(writer, length)
        else:
            writer.read(prompt)
            _print_as_it_comes(prompt.lstrip("\n"), writer.write(length))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A row at a time is too little work to share; and sums in one order write one text for a seed."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _converse(writer: Any, length: int) -> None:
    """A prompt per line, until the input ends. A line that cannot be read is told and forgotten."""
    at_terminal = sys.stdin.isatty()
    while True:
        if at_terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        prompt = line.rstrip("\r\n")
        try:
            writer.read(prompt)
            _print_as_it_comes("" if at_terminal else prompt, writer.write(length))
        except DataError as error:
            _complain(str(error))


def _print_as_it_comes(prompt: str, characters: Any) -> None:
    print(prompt, end="", flush=True)
    for character in characters:
        print(character, end="", flush=True)
    print(flush=True)


# --- convert ----------------------------------------------------------------------------------------------


def convert_tf1(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT.npz", help="Arrays by TF1 name.")],
    to: Annotated[Path, typer.Option(help="The safetensors file to write: a model's state_dict.")],
    function: Annotated[
        str | None, typer.Option(help="TF's function, where its scope is not among the names.")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="The scope of the variables, if not the function's.")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help='Names to leave out, "*/Adam*". Repeatable.')
    ] = None,
) -> None:
    """A checkpoint of a tf.contrib.legacy_seq2seq model as the state_dict of a model of steploop.seq2seq.legacy.

    The file holds every variable under its name: numpy.savez(FILE, **{name: reader.get_tensor(name)}).
    """
    from .seq2seq.tf_checkpoint import read, rows_of, save

    kept, left_out = read(checkpoint, ignore or [])
    model = save(kept, to, function, scope)
    from rich.table import Table

    table = Table(title=f"TF1 variables below {model.scope}")
    for heading in ("variable", "shape", "parameter"):
        table.add_column(heading, overflow="fold")
    for name, shape, parameter in rows_of(model):
        table.add_row(name.removeprefix(f"{model.scope}/"), shape, parameter)
    for name in left_out:
        table.add_row(name, "", "(left out)")
    console = Console()
    console.print(table)
    console.print(f"{type(model).__name__}, {len(kept)} variables: {to}", highlight=False, soft_wrap=True)


# --- explain ----------------------------------------------------------------------------------------------


def explain(
    target: Annotated[str, typer.Argument(metavar="FILE.py:Class", help="Where the step is.")],
    init: Annotated[str, typer.Option(help='What the class is made with: "8, 16" or "8, bias=False".')] = "",
    input: Annotated[
        list[str] | None,
        typer.Option(help='Shape of a sequence, "T,B,I"; "T,B:int" for whole numbers. Repeatable.'),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the plan as a web page.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the plan as JSON.")] = None,
    backend: UsedBackend = Backend.auto,
) -> None:
    """Print what runs before, in and after the loops of a step, and why.

    Without --input, the file's `example()` is called: it returns a step (or a loop), its inputs, and a dict of
    constants where it takes some.
    """
    plan = _plan(target, init, input or [], backend.value)
    print(plan)
    if html is not None:
        plan.save_html(html)
    if json is not None:
        written = plan.to_json()
        json.write_text(written if isinstance(written, str) else _as_json(written), encoding="utf-8")


def _plan(target: str, init: str, shapes: list[str], backend: str) -> Any:
    import steploop as sl

    file, _, name = target.partition(":")
    if name == "" and not file.endswith(".py"):
        raise InputError(f"Expected FILE.py:Class, got {target!r}")
    module = _load(Path(file))
    if shapes:
        step, inputs, constants = _make(module, file, name, init), [_tensor(shape) for shape in shapes], {}
    else:
        step, inputs, constants = _example(module, file, name)
    loop = step if isinstance(step, sl.Loop) else sl.Loop(step, backend=backend)
    with _users_errors(file):
        return loop.plan(*inputs, **constants)


@contextlib.contextmanager
def _users_errors(file: str | Path) -> Iterator[None]:
    """What the user's file raises, as a message with its line instead of a traceback."""
    try:
        yield
    except SteploopError:
        raise
    except SyntaxError as error:
        raise InputError(f"{error.filename}:{error.lineno}: {error.msg}\n  {(error.text or '').strip()}") from error
    except (Exception, SystemExit) as error:
        at = raised_at(error) or str(file)
        raise InputError(f"{at}: {type(error).__name__}: {error}") from error


def _load(file: Path) -> Any:
    """The user's file as a module; what it imports from beside it is found."""
    if not file.is_file():
        raise InputError(f"No such file: {file}")
    sys.path.insert(0, str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None:
        raise InputError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    with _users_errors(file):
        spec.loader.exec_module(module)
    return module


def _make(module: Any, file: str, name: str, init: str) -> Any:
    """The class `name` of the module, made with what `init` spells; or the step that `name` is."""
    import steploop as sl

    found = getattr(module, name, None)
    if isinstance(found, (sl.Step, sl.Loop)):
        return found
    if not (isinstance(found, type) and issubclass(found, (sl.Step, sl.Loop))):
        steps = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, sl.Step)
        ]
        what = "which is not a steploop.Step" if hasattr(module, name) else "which is not there"
        there = ", ".join(steps) or "no class that is a Step"
        raise InputError(f"{file} was asked for {name!r}, {what}.\n  found:    {there}")
    positional, named = _arguments(init)
    try:
        with _users_errors(file):
            return found(*positional, **named)
    except InputError as error:
        if not isinstance(error.__cause__, TypeError):
            raise
        raise InputError(
            f'{name}({init}): {error.__cause__}\n  fix:      --init "8, 16" with what {name} takes'
        ) from error


def _arguments(init: str) -> tuple[list[Any], dict[str, Any]]:
    """Positional and named literals, from "8, hidden_size=16"."""
    try:
        call = ast.parse(f"f({init})", mode="eval").body
        return (
            [ast.literal_eval(value) for value in call.args],
            {word.arg: ast.literal_eval(word.value) for word in call.keywords},
        )
    except (SyntaxError, ValueError, AttributeError):
        raise InputError(
            f'--init takes Python literals such as "8, 16" or "8, bias=False"; got {init!r}'
        ) from None


def _tensor(shape: str) -> Any:
    """A random sequence of a shape: "20,4,8" of floats, "20,4:int" of zeros (a number that any table has)."""
    import torch

    sizes, _, kind = shape.partition(":")
    try:
        numbers = [int(size) for size in sizes.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or kind not in ("", "float", "int"):
        raise InputError(f'--input takes a shape such as "20,4,8" (T,B,I) or "20,4:int"; got {shape!r}')
    return torch.zeros(numbers, dtype=torch.int64) if kind == "int" else torch.randn(numbers)


def _example(module: Any, file: str, name: str) -> tuple[Any, tuple, dict[str, Any]]:
    """(step or loop, inputs, constants) from the module's `example()`, or from the function that was named."""
    function = getattr(module, name or "example", None)
    if not callable(function) or isinstance(function, type):
        function = getattr(module, "example", None)
    if function is None:
        raise InputError(
            f"{file} has no example(), so the shape of the input is not known.\n"
            f'  fix:      steploop explain {file}:{name or "Class"} --init "..." --input "T,B,I"'
        )
    with _users_errors(file):
        made = function()
    if not (isinstance(made, tuple) and len(made) in (2, 3)):
        raise InputError(f"{file}: example() returns (step_or_loop, inputs[, constants]), got {type(made).__name__}")
    step, inputs, constants = (*made, {}) if len(made) == 2 else made
    return step, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), constants


def _as_json(value: Any) -> str:
    import json

    return json.dumps(value, indent=1)


# --- doctor -----------------------------------------------------------------------------------------------


def doctor() -> None:
    """Tell what this machine has: versions, threads, compiler, cache; and what to install."""
    import torch

    from . import __version__

    rows = {
        "steploop": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use",
    }
    # The native backend knows best of the compiler it uses; of threads it has something else to say.
    native = _native_backend()
    rows |= {f"native {name}" if name in rows else name: value for name, value in native.items()}
    rows.setdefault("compiler", _compiler())
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")


def _compiler() -> str:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in wanted:
        if found := shutil.which(name):
            return found
    if platform.system() == "Darwin":
        return "none; to install one: xcode-select --install"
    return "none; to install one: sudo apt install g++ (Debian, Ubuntu), sudo dnf install gcc-c++ (Fedora)"


def _native_backend() -> dict[str, str]:
    """What the native backend says of itself (its cache folder, its flags)."""
    try:
        from .backends.cpu import doctor as examine
    except ImportError:
        return {"native loops": "not in this version; loops run on the eager backend"}
    found = examine()
    return dict(found) if isinstance(found, dict) else {"native loops": str(found)}
