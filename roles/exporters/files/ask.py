"""Ask exporters whether they answer to the password and to nothing else; standard input is the password.

Arguments: the user, and a JSON list of ``{name, url, figures}``: ``figures`` are regular expressions, of which each has
to match a line. Prints one line for each exporter that does not answer as it should.
"""

import base64
import json
import re
import sys
import urllib.error
import urllib.request

user, password, failed = sys.argv[1], sys.stdin.read(), False
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(url: str, secret: str | None) -> tuple[int, str]:
    """(status, body); status 0 and the reason if there is no answer."""
    request = urllib.request.Request(url)  # noqa: S310  the role's own http://
    if secret is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{secret}".encode()).decode())
    try:
        with opener.open(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except OSError as error:
        return 0, str(error)


for entry in json.loads(sys.argv[2]):
    status, body = ask(entry["url"], password)
    faults = [f"says {status} to the password {body if status == 0 else ''}".rstrip()] if status != 200 else []
    if status == 200:
        missing = [figure for figure in entry["figures"] if not re.search(figure, body, re.MULTILINE)]
        faults += [f"has no line like {figure}" for figure in missing]
        for what, secret in (("no password", None), ("a wrong password", password + "-")):
            status, _ = ask(entry["url"], secret)
            if status != 401:
                faults.append(f"says {status} to {what}, not 401")
    for fault in faults:
        print(f"{entry['name']} at {entry['url']} {fault}")
        failed = True
sys.exit(failed)
