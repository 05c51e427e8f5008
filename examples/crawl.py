"""Crawl a small web site, level by level.

Shows: a group over each level with a limit, pages that fail without stopping the others, a retry,
and an id that makes a second start find the first run.

The site is served by this script itself, so nothing leaves your machine.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.error import HTTPError
from urllib.parse import urljoin

import kagzi
from kagzi import Context, ErrorStrategy, Retry

# --- the crawler ----------------------------------------------------------------------------


@dataclass
class Page:
    url: str
    links: list[str]


@dataclass
class Report:
    pages: list[str]
    broken: dict[str, str]


def is_worth_another_try(error: BaseException) -> bool:
    return isinstance(error, HTTPError) and error.code == 503


# A sync step runs in a thread of a pool process, so pages load while others are waited for.
@kagzi.step(retry=Retry(max_attempts=3, initial=0.05, on=is_worth_another_try), timeout=10)
def fetch(url: str) -> Page:
    with urllib.request.urlopen(url, timeout=5) as response:
        text = response.read().decode()
    return Page(url, [urljoin(url, link) for link in re.findall(r'href="([^"]+)"', text)])


@kagzi.workflow
async def crawl(ctx: Context, start: str) -> Report:
    seen = {start}
    level = [start]
    report = Report([], {})
    while level:
        found = await ctx.map("level", fetch, level, limit=16, on_error=ErrorStrategy.COLLECT_ALL)
        for index, failure in found.errors.items():
            report.broken[level[index]] = failure.message
        pages = [page for page in found.values if page is not None]
        report.pages += [page.url for page in pages]
        links = dict.fromkeys(link for page in pages for link in page.links)
        level = [link for link in links if link not in seen]
        seen.update(level)
    return report


# --- the site -------------------------------------------------------------------------------

SLOW_S = 0.05


def page_text(path: str) -> str | None:
    """Page /n links to /2n+1 and /2n+2, like a heap; a leaf may have a link that is broken."""
    number = int(path[1:] or 0)
    children = [child for child in (2 * number + 1, 2 * number + 2) if child < 63]
    if not children:
        children = [1000 + number] if number % 8 == 0 else []
    if number >= 1000:
        return None
    return "".join(f'<a href="/{child}">{child}</a>' for child in children)


class Site(BaseHTTPRequestHandler):
    asked: ClassVar[Counter[str]] = Counter()
    lock: ClassVar[threading.Lock] = threading.Lock()

    def do_GET(self) -> None:
        with self.lock:
            self.asked[self.path] += 1
            first_time = self.asked[self.path] == 1
        time.sleep(SLOW_S)
        text = page_text(self.path)
        if self.path == "/5" and first_time:
            self.send_error(503, "busy, come back")
        elif text is None:
            self.send_error(404, "no such page")
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # as many as the crawler may knock with at once


@contextmanager
def served_site() -> Iterator[str]:
    server = Server(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


async def main() -> None:
    with served_site() as start:
        async with kagzi.connect() as client, client.worker(processes=2):
            handle = await client.start(crawl, start, id=f"crawl of {start.replace('/', ':')}")
            report = await handle.result(timeout=60)
            run = await handle.describe()

            print(f"{len(report.pages)} pages, {len(report.broken)} broken links")
            for url, why in report.broken.items():
                print(f"  {url}: {why}")
            for attempt in run.attempts:
                again = "tried again" if attempt.retry_at else "given up"
                print(f"attempt {attempt.attempt} of {attempt.step_id} failed, {again}")
            for group in run.groups:
                print(
                    f"{group.path:8} {group.size:3} pages  {group.wall_s * 1000:5.0f} ms"
                    f"  speed-up {group.speedup:4.1f}"
                )

            before = Site.asked.total()
            again_handle = await client.start(crawl, start, id=handle.id)
            assert await again_handle.result() == report
            print(
                f"started again under the same id: new run {again_handle.is_new}, "
                f"{Site.asked.total() - before} more requests"
            )


if __name__ == "__main__":
    asyncio.run(main())
