"""Label values that explode cost one target of ours its scrape, are counted, and never fill the operator's server."""

import http.server
import json
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from filter.citadel_monitoring import citadel_scrape_configs, citadel_target_files

from tests.monitoring import servers

LIMITS = {"sample_limit": 100, "label_limit": 10, "label_value_length_limit": 50}
PAGES = {
    "/many": "".join(f'a_total{{user="{number}"}} 1\n' for number in range(101)),
    "/long": f'a_total{{user="{"x" * 51}"}} 1\n',
    "/wide": "a_total{" + ",".join(f'l{number}="x"' for number in range(11)) + "} 1\n",
    "/fine": "".join(f'a_total{{user="{number}"}} 1\n' for number in range(90)),
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        text = PAGES[self.path].encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def ask(url: str, query: str) -> dict[str, float]:
    """Value by label instance."""
    where = f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(where, timeout=10) as reply:
        found = json.load(reply)["data"]["result"]
    return {entry["metric"].get("instance", ""): float(entry["value"][1]) for entry in found}


def test_what_explodes_is_refused_and_counted_and_the_rest_goes_on(tmp_path: Path, address: str) -> None:
    jobs = [{"name": "citadel-gateway", "interval": "1s", "timeout": "1s"}]
    targets = [
        {
            "job": "citadel-gateway",
            "targets": [address],
            "labels": {"instance": path.strip("/"), "__metrics_path__": path},
        }
        for path in PAGES
    ]
    (tmp_path / "targets").mkdir()
    for name, text in citadel_target_files(targets).items():
        (tmp_path / "targets" / name).write_text(text)
    config = tmp_path / "prometheus.yml"
    entries = citadel_scrape_configs(jobs, targets, str(tmp_path), "", LIMITS)
    config.write_text(yaml.safe_dump({"scrape_configs": entries}))
    with servers.run_prometheus(config, tmp_path / "data") as url:
        end = time.monotonic() + 20
        while ask(url, "up") != {"fine": 1, "many": 0, "long": 0, "wide": 0} and time.monotonic() < end:
            time.sleep(0.3)
        assert ask(url, "up") == {"fine": 1, "many": 0, "long": 0, "wide": 0}
        assert ask(url, "count by (instance) (a_total)") == {"fine": 90}
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
            figures = dict(line.rsplit(" ", 1) for line in reply.read().decode().splitlines() if line[:1] != "#")
        assert float(figures["prometheus_target_scrapes_exceeded_sample_limit_total"]) >= 1
