"""What all tests share: golden files, fixed seeds, one torch thread, a hypothesis profile without deadlines."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import settings

from sylvester.compiler import knobs

GOLDEN = Path(__file__).parent / "golden"

settings.register_profile("shared-machine", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("shared-machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden from actual output")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--update-golden runs the tests that have a golden file and no others."""
    if config.getoption("--update-golden"):
        other = [item for item in items if "golden" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=other)
        items[:] = [item for item in items if item not in other]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compare a text with tests/golden/<file>.<test>.txt; one call per test."""
    path = GOLDEN / f"{request.path.stem}.{request.node.name.replace('/', '-')}.txt"

    def check(actual: str) -> None:
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(actual, encoding="utf-8")
        assert path.exists(), f"tests/golden has no {path.name}: run `make golden` and review the new file"
        assert actual == path.read_text(encoding="utf-8")

    return check


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody tuned on this machine must not change a test."""
    monkeypatch.setenv("SYLVESTER_TUNE", "0")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Test processes run side by side; more threads than cores would only slow them down."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def compile_anew() -> Iterator[None]:
    """Tests of the compiler must run it, whatever an earlier run has left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(knobs.REUSE.name, "0")
        yield


@pytest.fixture(scope="session")
def web_model(tmp_path_factory):
    """A small language model for the web and the CPU."""
    from tests import web

    folder = tmp_path_factory.mktemp("web-model")
    web.write_language_model(folder / "source")
    return web.build_pair(str(folder / "source"), None, folder, web.ISAS)


@pytest.fixture(scope="session")
def web_encoder(tmp_path_factory):
    """A small encoder of texts for the web and the CPU."""
    from tests import web

    return web.build_pair(web.trace_encoder(), None, tmp_path_factory.mktemp("web-encoder"), ("simd128",))


@pytest.fixture(scope="session")
def web_low_bit(tmp_path_factory):
    """A linear layer with 4 bits a weight and 8 an activation."""
    from tests import web

    layer = torch.nn.Linear(96, 40)
    folder = tmp_path_factory.mktemp("web-low-bit")
    return web.build_pair(layer, (torch.randn(3, 96),), folder, ("simd128", "relaxed"), "w4a8")


@pytest.fixture
def bundle(web_model):
    return web_model / "wasm"


@pytest.fixture
def texts(bundle):
    """For tests of texts."""
    if not (bundle / "vendor").is_dir():
        pytest.skip("npm is not installed, or could not fetch the tokenizer")


@pytest.fixture
def site(bundle):
    """The bundle on a server with faults."""
    from tests import web

    with web.serving(bundle) as site:
        yield site
