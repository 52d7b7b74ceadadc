"""What a step can depend on in Python, one kind each, as source text: for steps that are put together of several.

A kind has up to five texts. `module` stands in the module of the step, `body` in its class, `init` in `__init__`.
`read` is an expression of numbers or tensors inside `step`. `change` makes the expression another; k counts the
changes, from 1.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass

HEAD = """
import array, collections, contextvars, dataclasses, enum, functools, importlib, operator, os, sys, threading
import types, weakref
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
import steploop as sl
"""


@dataclass(frozen=True)
class Kind:
    name: str
    read: str
    change: str
    module: str = ""
    body: str = ""
    init: str = ""


def _put(text: str, place: str) -> str:
    return text.replace("{0}", place)


def _settings(name: str, made: str, read: str, change: str, module: str = "") -> list[Kind]:
    """One kind of object in three places: an attribute, a global, an attribute of the class."""
    return [
        Kind(f"{name}, attribute", _put(read, "self.v§"), _put(change, "step.v§"), module, init=f"self.v§ = {made}"),
        Kind(f"{name}, global", _put(read, "V§"), _put(change, "V§"), f"{module}\nV§ = {made}"),
        Kind(f"{name}, class", _put(read, "self.V§"), _put(change, "type(step).V§"), module, body=f"V§ = {made}"),
    ]


_CONFIG = """
class Config:
    def __init__(self): self.a = 1.0
    def get(self): return self.a
    @property
    def p(self): return self.a
    def __getitem__(self, i): return self.a
    def __call__(self, z): return z * self.a
    def __iter__(self): return iter([self.a])
    def __len__(self): return int(self.a)
class Dynamic:
    def __init__(self): self.data = {"q": 1.0}
    def __getattr__(self, name):
        if name in ("data", "__dict__"): raise AttributeError(name)
        return self.data[name]
@dataclasses.dataclass(slots=True)
class Slots:
    a: float = 1.0
@dataclasses.dataclass
class Outer:
    inner: Config = dataclasses.field(default_factory=Config)
Pair = collections.namedtuple("Pair", "a b")
class Mode(enum.Enum):
    ONE = 1.0
    TWO = 2.0
    THREE = 3.0
"""

KINDS: list[Kind] = [
    *_settings("float", "1.0", "{0}", "{0} = 1.0 + k"),
    *_settings("int", "1", "{0}", "{0} = 1 + k"),
    *_settings("text", "'a'", "(2.0 if {0} == 'a' else float(len({0})))", "{0} = 'a' * (k + 1)"),
    *_settings("dict", "{'a': 1.0}", "{0}['a']", "{0}['a'] = 1.0 + k"),
    *_settings("nested", "[({'a': [1.0]},)]", "{0}[0][0]['a'][0]", "{0}[0][0]['a'][0] += 1.0"),
    *_settings("list", "[1.0]", "sum({0})", "{0}.append(1.0)"),
    *_settings("set", "{1}", "float(len({0}))", "{0}.add(1 + k)"),
    *_settings("deque", "collections.deque([1.0])", "{0}[-1]", "{0}.append(1.0 + k)"),
    *_settings("bytearray", "bytearray([1])", "{0}[0]", "{0}[0] = 1 + k"),
    *_settings("array", "array.array('d', [1.0])", "{0}[0]", "{0}[0] = 1.0 + k"),
    *_settings("numpy", "np.array([1.0])", "float({0}[0])", "{0}[0] = 1.0 + k"),
    *_settings("tensor", "torch.ones(3)", "{0}", "{0}.add_(1.0)"),
    *_settings("tensor replaced", "torch.ones(3)", "{0}", "{0} = torch.full((3,), 1.0 + k)"),
    *_settings("tensor of another shape", "torch.ones(3)", "{0}", "{0} = torch.full((1,) if k % 2 else (3,), 1.0 + k)"),
    *_settings("content", "torch.ones(1)", "{0}.item()", "{0}.add_(1.0)"),
    *_settings("content as a list", "torch.ones(2)", "{0}.tolist()[1]", "{0}.add_(1.0)"),
    *_settings("object", "Config()", "{0}.a", "{0}.a += 1.0", _CONFIG),
    *_settings("object replaced", "Config()", "{0}.a", "c = Config(); c.a = 1.0 + k; {0} = c", _CONFIG),
    *_settings("method", "Config()", "{0}.get()", "{0}.a += 1.0", _CONFIG),
    *_settings("property", "Config()", "{0}.p", "{0}.a += 1.0", _CONFIG),
    *_settings("getitem", "Config()", "{0}['x']", "{0}.a += 1.0", _CONFIG),
    *_settings("iter", "Config()", "sum({0})", "{0}.a += 1.0", _CONFIG),
    *_settings("len", "Config()", "len({0})", "{0}.a += 1.0", _CONFIG),
    *_settings("call", "Config()", "{0}(1.0)", "{0}.a += 1.0", _CONFIG),
    *_settings("getattr of one's own", "Dynamic()", "{0}.q", "{0}.data['q'] += 1.0", _CONFIG),
    *_settings("slots", "Slots()", "{0}.a", "{0}.a += 1.0", _CONFIG),
    *_settings("dataclass", "Outer()", "{0}.inner.a", "{0}.inner.a += 1.0", _CONFIG),
    *_settings("asdict", "Slots()", "dataclasses.asdict({0})['a']", "{0}.a += 1.0", _CONFIG),
    *_settings("vars", "Config()", "vars({0})['a']", "{0}.a += 1.0", _CONFIG),
    *_settings("computed name", "Config()", "getattr({0}, 'ab'[:1])", "{0}.a += 1.0", _CONFIG),
    *_settings("attrgetter", "Config()", "operator.attrgetter('a')({0})", "{0}.a += 1.0", _CONFIG),
    *_settings("format", "Config()", "float(FORMAT.format({0}))", "{0}.a += 1.0", _CONFIG + "\nFORMAT = '{0.a}'"),
    *_settings("namedtuple", "Pair(1.0, 2.0)", "{0}.a", "{0} = Pair(1.0 + k, 2.0)", _CONFIG),
    *_settings("enum", "Mode.ONE", "{0}.value", "{0} = [Mode.ONE, Mode.TWO, Mode.THREE][k % 3]", _CONFIG),
    *_settings("namespace", "types.SimpleNamespace(a=1.0)", "{0}.a", "{0}.a += 1.0"),
    *_settings("ordered", "collections.OrderedDict(a=1.0, b=2.0)", "next(iter({0}.values()))",
               "{0}.move_to_end(next(iter({0})))"),
    *_settings("defaultdict", "collections.defaultdict(float, a=1.0)", "{0}['a']", "{0}['a'] += 1.0"),
    *_settings("chain map", "collections.ChainMap({}, {'a': 1.0})", "{0}['a']", "{0}['a'] = 1.0 + k"),
    *_settings("class", "type('C', (), {'a': 1.0})", "{0}.a", "{0}.a = 1.0 + k"),
    *_settings("thread-local", "local()", "{0}.a", "{0}.a += 1.0",
               "def local():\n    v = threading.local(); v.a = 1.0; return v"),
    *_settings("function", "(lambda: 1.0)", "{0}()", "{0} = [lambda: 2.0, lambda: 3.0, lambda: 4.0][k % 3]")[1:2],
    *_settings("partial", "functools.partial(float.__add__, 0.0)", "{0}(1.0)",
               "{0} = functools.partial(float.__add__, float(k))"),
    *_settings("weak reference", "Held()", "{0}.r().a", "{0}.r().a += 1.0",
               _CONFIG + "\nclass Held:\n    def __init__(self): self.c = Config(); self.r = weakref.ref(self.c)"),
    Kind("globals()", "globals()['G1']", "G1 += 1.0", "G1 = 1.0"),
    Kind("context variable", "CV.get()", "CV.set(1.0 + k)", "CV = contextvars.ContextVar('cv', default=1.0)"),
    Kind("environment", "float(os.environ['STEPLOOP_TEST_X'])", "os.environ['STEPLOOP_TEST_X'] = str(1.0 + k)",
         "os.environ['STEPLOOP_TEST_X'] = '1.0'"),
    Kind("getenv", "float(os.getenv('STEPLOOP_TEST_Y', '1.0'))", "os.environ['STEPLOOP_TEST_Y'] = str(1.0 + k)",
         "os.environ.pop('STEPLOOP_TEST_Y', None)"),
    Kind("module", "MOD.a", "MOD.a += 1.0", "MOD = types.ModuleType('mod'); MOD.a = 1.0"),
    Kind("module behind an attribute", "self.m.a", "step.m.a += 1.0",
         "M2 = types.ModuleType('m2'); M2.a = 1.0", init="self.m = M2"),
    Kind("getattr of a module", "getattr(M3, 'xa'[1:])", "M3.a += 1.0", "M3 = types.ModuleType('m3'); M3.a = 1.0"),
    Kind("import", "read_import()", "sys.modules['steploop_test_m4'].a += 1.0",
         "m4 = sys.modules['steploop_test_m4'] = types.ModuleType('steploop_test_m4'); m4.a = 1.0\n"
         "def read_import():\n    import steploop_test_m4\n    return steploop_test_m4.a"),
    Kind("import from", "read_from()", "sys.modules['steploop_test_m5'].a += 1.0",
         "m5 = sys.modules['steploop_test_m5'] = types.ModuleType('steploop_test_m5'); m5.a = 1.0\n"
         "def read_from():\n    from steploop_test_m5 import a\n    return a"),
    Kind("importlib", "importlib.import_module('steploop_test_m6').a", "sys.modules['steploop_test_m6'].a += 1.0",
         "m6 = sys.modules['steploop_test_m6'] = types.ModuleType('steploop_test_m6'); m6.a = 1.0"),
    Kind("default", "dflt()", "dflt.__defaults__ = (1.0 + k,)", "def dflt(a=1.0): return a"),
    Kind("keyword default", "kwd()", "kwd.__kwdefaults__ = {'a': 1.0 + k}", "def kwd(*, a=1.0): return a"),
    Kind("mutable default", "mdf()", "mdf.__defaults__[0].append(1.0)", "def mdf(a=[1.0]): return sum(a)"),
    Kind("function attribute", "fat()", "fat.a = 1.0 + k", "def fat(): return getattr(fat, 'a', 1.0)"),
    Kind("code", "cod()", "cod.__code__ = [c2, c3][k % 2].__code__",
         "def cod(): return 1.0\ndef c2(): return 2.0\ndef c3(): return 3.0"),
    Kind("closure", "CLO[0]()", "CLO[1](1.0 + k)",
         "def make_clo():\n    a = 1.0\n    def read(): return a\n    def write(v):\n"
         "        nonlocal a\n        a = v\n"
         "    return read, write\nCLO = make_clo()"),
    Kind("no_grad", "ngr(1.0)", "NG['a'] += 1.0", "NG = {'a': 1.0}\n@torch.no_grad()\ndef ngr(z): return z * NG['a']"),
    Kind("autocast", "atc(1.0)", "AC = 1.0 + k",
         "AC = 1.0\n@torch.autocast('cpu', enabled=False)\ndef atc(z): return z * AC"),
    Kind("wraps", "wrp(1.0)", "WR += 1.0",
         "WR = 1.0\ndef deco(f):\n    @functools.wraps(f)\n    def inner(*a): return f(*a)\n    return inner\n"
         "@deco\ndef wrp(z): return z * WR"),
    Kind("singledispatch", "sdp(1.0)", "SD += 1.0",
         "SD = 1.0\n@functools.singledispatch\ndef sdp(z): return z * SD"),
    Kind("singledispatch registered later", "sdr(1.0)", "sdr.register(float, [lambda z: 2.0, lambda z: 3.0][k % 2])",
         "@functools.singledispatch\ndef sdr(z): return z"),
    Kind("static method", "self.sm()", "SM += 1.0", "SM = 1.0", "@staticmethod\ndef sm(): return SM"),
    Kind("class method", "self.cm()", "type(step).CM += 1.0",
         body="CM = 1.0\n@classmethod\ndef cm(cls): return cls.CM"),
    Kind("property of the step", "self.pp", "step.ppv += 1.0", body="@property\ndef pp(self): return self.ppv",
         init="self.ppv = 1.0"),
    Kind("cached property", "self.cp", "step.cpv += 1.0; step.__dict__.pop('cp', None)",
         body="@functools.cached_property\ndef cp(self): return self.cpv", init="self.cpv = 1.0"),
    Kind("nested class", "self.Nested.a", "type(step).Nested.a += 1.0", body="class Nested:\n    a = 1.0"),
    Kind("descriptor", "self.dsc", "type(step).__dict__['dsc'].v += 1.0",
         "class Dsc:\n    v = 1.0\n    def __get__(self, o, t=None): return self.v", "dsc = Dsc()"),
    Kind("metaclass", "MC.a", "Meta.base += 1.0",
         "class Meta(type):\n    base = 1.0\n    @property\n    def a(cls): return cls.base\n"
         "class MC(metaclass=Meta): pass"),
    Kind("inherited", "INH().a()", "INB.a = [lambda s: 2.0, lambda s: 3.0][k % 2]",
         "class INB:\n    def a(self): return 1.0\nclass INH(INB): pass"),
    Kind("shadowed", "SHD.a", "SHD.a = 1.0 + k", "class SHB:\n    a = 1.0\nclass SHC(SHB): pass\nSHD = SHC()"),
    Kind("shadowed in a class", "SGD.a", "SGC.a = 1.0 + k",
         "class SGB:\n    a = 1.0\nclass SGC(SGB): pass\nSGD = SGC()"),
    Kind("__class__", "CLS.a", "CLS.__class__ = [CL2, CL3][k % 2]",
         "class CL1:\n    a = 1.0\nclass CL2:\n    a = 2.0\nclass CL3:\n    a = 3.0\nCLS = CL1()"),
    Kind("method of the instance", "self.im()", "step.im = [lambda: 2.0, lambda: 3.0][k % 2]",
         body="def im(self): return 1.0"),
    Kind("method of the class", "self.mc()", "type(step).mc = [lambda s: 2.0, lambda s: 3.0][k % 2]",
         body="def mc(self): return 1.0"),
    Kind("a global that was built in", "float(abs(-1.0))", "abs = [lambda z: 2.0, lambda z: 3.0][k % 2]"),
    Kind("hook", "self.hk(torch.ones(3))", "step.hk.register_forward_hook(lambda m, a, o: o * 2)",
         init="self.hk = nn.Identity()"),
    Kind("hook before", "self.hb(torch.ones(3))", "step.hb.register_forward_pre_hook(lambda m, a: (a[0] * 2,))",
         init="self.hb = nn.Identity()"),
    Kind("hook of the gradient", "self.hg(self.w.bias * 2)",
         "step.hg.register_full_backward_hook(lambda m, g, o: (g[0] * 2,))", init="self.hg = nn.Tanh()"),
    Kind("hook before the gradient", "self.hh(self.w.bias * 2)",
         "step.hh.register_full_backward_pre_hook(lambda m, o: (o[0] * 2,))", init="self.hh = nn.Tanh()"),
    Kind("mode", "(1.0 if self.training else 2.0)", "step.train(k % 2 == 0)"),
    Kind("mode of a child", "self.drop(torch.ones(3)).mean() * 0 + (1.0 if self.drop.training else 3.0)",
         "step.drop.train(k % 2 == 0)", init="self.drop = nn.Dropout(0.0)"),
    Kind("parameter replaced", "self.pr", "step.pr = nn.Parameter(torch.full((3,), 1.0 + k))",
         init="self.pr = nn.Parameter(torch.ones(3))"),
    Kind("parameter through data", "self.pd", "step.pd.data.add_(1.0)", init="self.pd = nn.Parameter(torch.ones(3))"),
    Kind("parameter through numpy", "self.pn", "step.pn.detach().numpy().__iadd__(1.0)",
         init="self.pn = nn.Parameter(torch.ones(3))"),
    Kind("parameter frozen", "self.pf", "step.pf.requires_grad_(k % 2 == 0)",
         init="self.pf = nn.Parameter(torch.ones(3))"),
    Kind("child replaced", "self.ch(torch.ones(3)).sum()", "step.ch = [nn.Tanh(), nn.Sigmoid(), nn.ReLU()][k % 3]",
         init="self.ch = nn.Identity()"),
    Kind("child added", "sum(m(torch.ones(3)) for m in self.ml)", "step.ml.append(nn.Tanh())",
         init="self.ml = nn.ModuleList([nn.Tanh()])"),
    Kind("buffer", "self.bf", "step.bf.mul_(2.0)", init="self.register_buffer('bf', torch.ones(3))"),
    Kind("attribute of a tensor", "self.at.scale", "step.at.scale += 1.0",
         init="self.at = torch.ones(3); self.at.scale = 1.0"),
    Kind("custom function", "Grad.apply(torch.ones(3))", "FN['a'] += 1.0",
         "FN = {'a': 1.0}\nclass Grad(torch.autograd.Function):\n    @staticmethod\n"
         "    def forward(ctx, x): return x * FN['a']\n"
         "    @staticmethod\n    def backward(ctx, g): return g * FN['a']"),
    Kind("custom gradient", "Gra2.apply(self.w.bias)", "F2['a'] += 1.0",
         "F2 = {'a': 1.0}\nclass Gra2(torch.autograd.Function):\n    @staticmethod\n"
         "    def forward(ctx, x): return x * 1\n"
         "    @staticmethod\n    def backward(ctx, g): return g * F2['a']"),
]  # fmt: skip


def build(kinds: list[Kind], number: int) -> types.ModuleType:
    """A module with a Step, `step`, that reads all of these, and a function `change(i, k)`."""
    module = types.ModuleType(f"steploop_test_step_{number}")
    lines = [HEAD]
    changes = []
    for i, kind in enumerate(kinds):
        lines.append(_own(kind.module, i, kind))
        changes.append(_own(kind.change, i, kind))
    body = "\n".join(_own(kind.body, i, kind) for i, kind in enumerate(kinds) if kind.body)
    init = [_own(kind.init, i, kind) for i, kind in enumerate(kinds) if kind.init]
    reads = [f"z = z * ({_own(kind.read, i, kind)})" for i, kind in enumerate(kinds)]
    lines.append("class Cell(sl.Step):")
    lines += [f"    {line}" for line in body.splitlines()]
    lines += ["    def __init__(self):", "        super().__init__()"]
    lines += ["        self.h, self.w = sl.State(3), nn.Linear(3, 3)"]
    lines += [f"        {line}" for line in init]
    lines += ["    def step(self, x):", "        z = self.w(x) + self.h.prev"]
    lines += [f"        {line}" for line in reads]
    lines += ["        self.h.next = torch.tanh(z)", "        return self.h.next"]
    text = "\n".join(lines)
    sys.modules[module.__name__] = module
    exec(compile(text, f"<step {number}>", "exec"), vars(module))
    module.text = text
    module.step = module.Cell()
    compiled = [compile(change, f"<change {number}>", "exec") for change in changes]

    def change(i: int, k: int) -> None:
        module.k = k
        exec(compiled[i], vars(module))

    module.change = change
    return module


def _own(text: str, i: int, kind: Kind) -> str:
    """The text with names of its own, where several kinds are put together."""
    return text.replace("§", str(i))
