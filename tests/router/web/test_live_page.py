"""The live page in a real browser, before a real router and the embedded model."""

from __future__ import annotations

import asyncio
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from jetflow_cluster import EngineConfig
from jetflow_cluster.engine.frontend import EngineFrontend
from jetflow_cluster.models.hub import DEFAULT_CHECKPOINT
from jetflow_cluster.router.safety import SafetyConfig
from jetflow_cluster.router.web.page_files import FOLDER, HEADERS
from support.browser import chromium
from support.router_stack import Stack, stack
from support.toy_cluster import run

TARGET = DEFAULT_CHECKPOINT / "target"
#: A tag that a page would run, often enough that the model goes on with it.
EVIL = '<img src=x onerror="window.hit=1"><b>bold</b>\n' * 6
SECRET = "a-secret-of-sixteen-and-more"


@pytest.fixture(scope="module")
def served() -> list[EngineFrontend]:
    config = EngineConfig(dtype="float32", device="cpu", num_pages=128, max_num_requests=4)
    return [EngineFrontend(config, tree_nodes={1: 24})]


def in_browser(served: list[EngineFrontend], visit: Callable[[Any, Stack], None], **options: Any) -> None:
    """Runs `visit` with a browser that has the page open."""

    async def test() -> None:
        async with stack(served, TARGET, http_port=0, **options) as made:

            def work() -> None:
                with chromium() as browser:
                    browser.get(f"http://127.0.0.1:{made.router.http_port}/")
                    visit(browser, made)

            await asyncio.to_thread(work)
            await made.is_idle()

    run(test, 120)


def wait(browser: Any, script: str, timeout_s: float = 30.0) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, timeout_s, 0.05).until(lambda b: b.execute_script(f"return {script}"))


def text(browser: Any, name: str) -> str:
    return str(browser.execute_script("return document.getElementById(arguments[0]).textContent", name))


def ask(browser: Any, prompt: str, num_tokens: int) -> None:
    for name, value in (("prompt", prompt), ("max-tokens", str(num_tokens))):
        field = browser.find_element("id", name)
        field.clear()
        field.send_keys(value)
    browser.find_element("id", "run").click()


def test_a_run_with_trees_and_the_same_token_by_token(served: list[EngineFrontend]) -> None:
    def visit(browser: Any, made: Stack) -> None:
        base = f"http://127.0.0.1:{made.router.http_port}/"
        ask(browser, "def fibonacci(n):\n    if n < 2:\n        return n\n", 48)
        wait(browser, "document.getElementById('status').textContent == 'done'")
        assert text(browser, "error") == ""
        assert text(browser, "verdict") == "identical" and "all 48 tokens" in text(browser, "verdict-note")
        assert re.fullmatch(r"\d+\.\d\d×", text(browser, "ratio"))
        spans = browser.find_elements("css selector", "#output .token")
        assert len(spans) == 48
        kinds = [set(span.get_attribute("class").split()) & {"kept", "context", "own"} for span in spans]
        assert {"kept"} in kinds and {"own"} in kinds and all(len(kind) == 1 for kind in kinds)
        # The numbers are those of the tokens.
        guessed = sum(kind != {"own"} for kind in kinds)
        assert int(text(browser, "trees-kept")) == guessed <= int(text(browser, "trees-checked"))
        assert (text(browser, "plain-kept"), text(browser, "plain-tokens")) == ("0", "48")
        assert float(text(browser, "trees-length")) > 1.5 and text(browser, "plain-length") == "1.00"
        assert text(browser, "trees-share") == f"{round(100 * guessed / 48)}%"
        # A token leads to its step's tree, and the slider to others.
        spans[1].click()
        first = browser.find_element("id", "tree").get_attribute("innerHTML")
        assert text(browser, "step-name") == "Step 1"
        kept = browser.find_elements("css selector", "#tree rect.node.kept:not(.root)")
        chosen = browser.find_elements("css selector", "#output .now")
        own = browser.find_elements("css selector", "#tree rect.own")
        assert chosen and len(kept) + len(own) == len(chosen)
        browser.find_element("id", "after").click()
        assert text(browser, "step-name") == "Step 2"
        assert browser.find_element("id", "tree").get_attribute("innerHTML") != first
        assert browser.get_log("browser") == []
        asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        urls = [entry["params"]["request"]["url"] for entry in asked if entry["method"] == "Network.requestWillBeSent"]
        assert len(urls) > 5 and all(url.startswith(base) for url in urls), urls

    in_browser(served, visit)


def test_what_a_model_says_stays_text(served: list[EngineFrontend]) -> None:
    def visit(browser: Any, made: Stack) -> None:
        browser.execute_script("document.getElementById('prompt').value = arguments[0]", EVIL)
        browser.find_element("id", "run").click()
        wait(browser, "document.getElementById('status').textContent == 'done'")
        shown = text(browser, "output")
        assert shown.startswith(EVIL) and "<" in shown[len(EVIL) :], "the model went on with tags"
        assert not browser.find_elements("css selector", "#output img, #output b, #tree img, #tree b")
        assert browser.execute_script("return window.hit") is None
        assert browser.find_elements("css selector", "#output .context"), "what repeats itself is found in the text"

    in_browser(served, visit)


def test_errors_are_shown_and_a_stop_ends_the_request(served: list[EngineFrontend], tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(f"- {{name: me, token: {SECRET}}}\n")

    def visit(browser: Any, made: Stack) -> None:
        wait(browser, "document.getElementById('error').textContent.startsWith('401: a known token')")
        browser.find_element("id", "token").send_keys(SECRET)
        ask(browser, "x = 1\n", 100_000)
        wait(browser, "document.querySelectorAll('#output .token').length > 4")
        browser.find_element("id", "stop").click()
        wait(browser, "document.getElementById('status').textContent == 'stopped'")
        assert browser.find_element("id", "run").is_enabled()
        assert browser.execute_script("return [localStorage.length, sessionStorage.length, document.cookie]") == [
            0,
            0,
            "",
        ]
        ask(browser, "", 4)
        wait(browser, "document.getElementById('error').textContent.startsWith('400: ')")

    in_browser(served, visit, safety=SafetyConfig(token_file=str(tokens)))


def test_files_and_headers(served: list[EngineFrontend], tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(f"- {{name: me, token: {SECRET}}}\n")

    async def test() -> None:
        safety = SafetyConfig(token_file=str(tokens))
        async with stack(served, TARGET, http_port=0, safety=safety) as made, aiohttp.ClientSession() as session:
            base = f"http://127.0.0.1:{made.router.http_port}"
            names = ["", *(f"page/{path.name}" for path in FOLDER.iterdir())]
            assert len(names) == 8
            for name in names:
                answer = await session.get(f"{base}/{name}")
                assert answer.status == 200
                assert {key: answer.headers[key] for key in HEADERS} == HEADERS
            assert (await session.get(f"{base}/page/none.js")).status == 404
            assert (await session.get(f"{base}/page/..%2fapp.py")).status == 404
            assert (await session.post(f"{base}/")).status == 405

    run(test, 60)


def test_the_package_has_the_files() -> None:
    data = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    root = FOLDER.parents[2]
    shipped = {path for pattern in data["jetflow_cluster"] for path in root.glob(pattern)}
    assert shipped >= set(FOLDER.iterdir())


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_no_file_names_the_outside_or_runs_text(path: Path) -> None:
    content = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z0-9.-]+\.[a-z]{2,}|@import|url\(", content)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\bFunction\(|\son\w+=", content
    )
