"""Takes `live-page.png`, beside this file, from a server that runs: ``python docs/images/live_page.py [address]``.

Needs selenium and a Chromium with its driver. The address is that of the HTTP port, http://localhost:8000 without one.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.support.ui import WebDriverWait


def take(address: str, file: Path, *flags: str) -> None:
    """Runs the page's example and writes what is seen of the whole page."""
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in ("headless=new", "no-sandbox", "window-size=1360,1250", "hide-scrollbars", *flags):
        options.add_argument(f"--{flag}")
    browser = Chrome(options=options, service=ChromeService(shutil.which("chromedriver") or "chromedriver"))
    try:
        browser.get(address)
        browser.find_element("id", "run").click()
        done = "return document.getElementById('status').textContent == 'done'"
        WebDriverWait(browser, 120, 0.1).until(lambda b: b.execute_script(done))
        # Of the steps the one that kept most.
        most = """const count = {}; let best;
            for (const token of document.querySelectorAll('#output .kept')) {
              count[token.title] = (count[token.title] ?? 0) + 1;
              if (!best || count[token.title] > count[best.title]) best = token;
            }
            best.click();
            document.getElementById('output').scrollTop = 0;
            window.scrollTo(0, 0);
            return document.documentElement.scrollHeight"""
        browser.set_window_size(1360, min(1800, browser.execute_script(most) + 140))
        browser.save_screenshot(str(file))
    finally:
        browser.quit()


if __name__ == "__main__":
    take(sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000", Path(__file__).with_name("live-page.png"))
