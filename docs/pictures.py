"""The picture of the explorer in the documentation, made by using it: ``python docs/pictures.py docs/explorer.png``."""

import os
import shutil
import socket
import sys
import threading

import uvicorn
from playwright.sync_api import sync_playwright

from qstar_decoding.explorer.server import create_app

with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    server = uvicorn.Server(uvicorn.Config(create_app(), log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    with sync_playwright() as playwright:
        executable = os.environ.get("QSTAR_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(f"http://127.0.0.1:{listener.getsockname()[1]}")
        page.locator("#go:enabled").click()  # task sentiment, its first held-out prompt, A* on the shipped Q
        page.locator(".card a[download]").wait_for(timeout=120_000)
        page.click("text=Open the tree")
        page.locator(".tree .item.best").nth(3).click()
        page.locator(".side b:not(:empty)").wait_for()
        page.screenshot(path=sys.argv[1])
        browser.close()
    server.should_exit = True
    thread.join()
