"""The operator's page in a real browser, on a real server."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import yaml
from checkpoints import add_tokenizer, make_checkpoint
from plan_file import factory_plan
from playwright.sync_api import Browser, Page, expect, sync_playwright
from servers import Server

NET = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
"""

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this host; on Debian: apt-get install chromium"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two ranks, behind a key."""
    folder = tmp_path_factory.mktemp("shown") / "tiny"
    folder.mkdir()
    changes = {"vocab_size": 259, "max_position_embeddings": 512, "eos_token_id": None}
    make_checkpoint("llama", folder, **changes)
    key = folder.parent / "key"
    key.write_text("secret")
    cut = ["-pp", "2", "--set", f"server.api_key_file={key}"]
    with Server.start(add_tokenizer(folder), *cut) as server:
        yield server


@pytest.fixture(scope="module")
def tensor_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One rank."""
    folder = tmp_path_factory.mktemp("net")
    (folder / "shown_model.py").write_text(NET)
    plan = factory_plan(folder, "shown_model:make", {"name": "x", "shape": ["batch", 4]})
    plan |= {"scheduler": {"max_batch_size": 8}, "server": {"model_name": "net"}}
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    with Server.start(folder / "plan.yaml") as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser
        browser.close()


def test_the_page_needs_no_key_and_its_data_do(server: Server) -> None:
    page = httpx.get(server.url)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "tiny" not in page.text
    for path in ("/status", "/status/plan.svg", "/metrics"):
        assert httpx.get(f"{server.url}{path}").status_code == 401
    status = httpx.get(f"{server.url}/status", headers={"Authorization": "Bearer secret"}).json()
    assert (status["model"], status["state"]) == ("tiny", "ready")
    assert [(rank["rank"], rank["stage"]) for rank in status["ranks"]] == [(0, 0), (1, 1)]
    assert 0 <= status["idle_s"] < 10, "idle ranks step every second"
    assert status["gpus"] == {"reason": "the ranks run on the CPU", "by_rank": {}}


@contextmanager
def opened(server: Server, browser: Browser) -> Iterator[Page]:
    """Its page, which asks nobody else and has no faults."""
    page: Page = browser.new_page()
    asked: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    # A refused key is in the console too, and meant.
    page.on(
        "console",
        lambda said: said.type == "error" and "401" not in said.text and faults.append(said.text),
    )
    page.goto(server.url)
    yield page
    own = (server.url, "blob:", "data:")
    assert [url for url in asked if not url.startswith(own)] == []
    assert faults == []
    page.close()


def expect_plan(page: Page) -> None:
    """The drawing is there, and is one."""
    expect(page.locator("#plan")).to_be_visible()
    assert page.locator("#plan").evaluate(
        "async (image) => (await image.decode(), image.naturalWidth)"
    )


@needs_browser
def test_an_operator_unlocks_the_page_and_streams_an_answer(
    server: Server, browser: Browser
) -> None:
    with opened(server, browser) as page:
        page.locator("#key").fill("secret")
        page.get_by_role("button", name="Unlock").click()
        expect(page.locator("#state")).to_have_text("ready")
        expect(page.locator("#ranks tr")).to_have_count(2)
        expect(page.locator("#gpu-note")).to_contain_text("the ranks run on the CPU")
        expect_plan(page)
        page.locator("#kind").select_option("text")
        page.locator("#max-tokens").fill("400")
        page.locator("#prompt").fill("<b>hello</b>")
        page.locator("#send").click()
        expect(page.locator("#answer")).not_to_be_empty()
        # It streams: there is text, and the answer goes on.
        assert page.locator("#stop").is_visible()
        length = len(page.locator("#answer").inner_text())
        expect(page.locator("#ended")).to_contain_text("length", timeout=20_000)
        assert len(page.locator("#answer").inner_text()) > length
        assert page.locator("#answer *").count() == 0
        expect(page.locator("#charts figure")).to_have_count(8)


@needs_browser
def test_the_page_of_a_tensor_model_shows_batches_and_no_prompt(
    tensor_server: Server, browser: Browser
) -> None:
    infer = {
        "inputs": [{"name": "x", "shape": [3, 4], "datatype": "FP32", "data": [0.5] * 12}],
    }
    with opened(tensor_server, browser) as page:
        expect(page.locator("#state")).to_have_text("ready")
        answer = httpx.post(f"{tensor_server.url}/v2/models/net/infer", json=infer)
        assert answer.status_code == 200, answer.text
        expect(page.locator("#ended")).to_contain_text("completed")
        expect(page.locator("#figures")).to_contain_text("Samples waiting")
        expect(page.locator("#ranks tr")).to_have_count(1)
        expect(page.locator("#charts figure")).to_have_count(8)
        expect(page.locator("#charts")).to_contain_text("Wait for a batch")
        # Of the slot that is over, so some seconds later.
        mean = page.locator("#charts figure", has_text="Samples of a batch").locator("b")
        expect(mean).to_have_text("3.0", timeout=15_000)
        expect(page.locator("#prompt")).to_be_hidden()
        expect_plan(page)
