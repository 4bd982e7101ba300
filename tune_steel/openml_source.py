"""Downloads from OpenML through the `openml` package, in a process of its own.

The package has no timeouts, adds handlers to the root logger, makes folders in the home directory
and keeps truncated downloads. A child process with its own environment, a temporary folder and a
deadline contains all of that, name look-ups and servers that trickle included. Reading the
downloaded file is `data.py`'s work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tune_steel.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    import requests


CONNECT_TIMEOUT_S = 3.0
READ_TIMEOUT_S = 15.0
TRIES = 2  # openml repeats a truncated file, a wrong checksum and a busy database; nothing else
_ANSWER = "answer.json"


@dataclass(frozen=True)
class Download:
    """A dataset as it lies in the download folder.

    Attributes:
        arff: The file, whose checksum agrees with the dataset's description.
        target: OpenML's default target, where it names exactly one.
        left_out: Columns that OpenML marks as row identifiers or as to be ignored.
    """

    arff: Path
    target: str | None
    left_out: tuple[str, ...]


class _RefusedError(Exception):
    """A failure whose message is already the line to show; openml does not repeat it."""


def download(dataset_id: int, folder: Path, deadline_s: float) -> Download:
    """Fetch the ARFF file of an OpenML dataset into `folder`.

    The server is the one that openml's own configuration file names.

    Args:
        dataset_id: OpenML's number of the dataset.
        folder: An existing, empty folder; the caller removes it.
        deadline_s: Seconds after which the download is given up, whatever it is doing.

    Raises:
        DataError: The dataset could not be fetched; the message says what happened.
    """
    module = [sys.executable, "-P", "-W", "ignore", "-m", "tune_steel.openml_source"]
    try:
        child = subprocess.run(
            [*module, str(dataset_id), str(folder), str(READ_TIMEOUT_S)],
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DataError(
            f"OpenML dataset {dataset_id} did not arrive within {deadline_s:g} s"
        ) from None
    try:
        answer = json.loads((folder / _ANSWER).read_text())
    except (OSError, ValueError):
        last = child.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DataError(
            f"fetching OpenML dataset {dataset_id} ended with status {child.returncode}: {last[0]}"
        ) from None
    if "error" in answer:
        raise DataError(f"OpenML dataset {dataset_id} could not be fetched: {answer['error']}")
    return Download(Path(answer["arff"]), answer["target"], tuple(answer["left_out"]))


def _environment(folder: Path) -> dict[str, str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
        ),
        # Only the ARFF file comes with a checksum.
        "OPENML_SKIP_PARQUET": "true",
        "OPENML_CACHE_DIR": str(folder),
        # glibc would try an unreachable name server for 10 s.
        "RES_OPTIONS": "timeout:2 attempts:1",
    }
    # openml makes a folder for its configuration file; where it has no such file yet, the
    # temporary folder does. `config` straight in the home is where older versions kept it.
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    if not (home / "openml").exists() and not (home / "config").exists():
        environment["XDG_CONFIG_HOME"] = str(folder)
    return environment


def _fetch(dataset_id: int, read_timeout_s: float) -> dict[str, Any]:
    import openml
    import requests

    send: Callable[..., requests.Response] = requests.Session.request

    def request(
        session: requests.Session, method: str, url: str, **options: object
    ) -> requests.Response:
        host = "{0.scheme}://{0.netloc}".format(urlsplit(url))
        handled = sys.exception()  # openml may call from within an `except`
        try:
            response = send(
                session, method, url, timeout=(CONNECT_TIMEOUT_S, read_timeout_s), **options
            )
        except requests.ConnectionError as error:
            raise _RefusedError(f"{host} cannot be reached ({_reason(error, handled)})") from None
        except requests.ReadTimeout:
            raise _RefusedError(f"{host} did not answer within {read_timeout_s:g} s") from None
        # openml trips over error pages that are not its XML, which is what proxies send.
        if not response.ok and b"oml:error" not in response.content:
            raise _RefusedError(f"{url} answered HTTP {response.status_code}")
        # Without a charset requests assumes Latin-1, and openml takes the checksum of the text.
        if "charset" not in response.headers.get("content-type", ""):
            response.encoding = "utf-8"
        return response

    requests.Session.request = request  # type: ignore[method-assign, assignment]
    openml.config.set_retry_policy("human", TRIES)
    dataset = openml.datasets.get_dataset(dataset_id, download_data=True)
    target = dataset.default_target_attribute
    return {
        "arff": str(dataset.data_file),
        "target": target if target and "," not in target else None,
        "left_out": _names(dataset.row_id_attribute) + _names(dataset.ignore_attribute),
    }


def _names(value: str | list[str] | None) -> list[str]:
    listed = [value] if isinstance(value, str) else value or []
    return [name for entry in listed for name in entry.split(",")]


def _reason(error: BaseException, handled: BaseException | None) -> str:
    """The innermost reason, such as `Connection refused`, of an error raised by requests."""
    while (inner := error.__cause__ or error.__context__) and inner is not handled:
        error = inner
    return getattr(error, "strerror", None) or _line(error)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _main() -> None:
    dataset_id, folder, read_timeout_s = sys.argv[1:]
    try:
        answer = _fetch(int(dataset_id), float(read_timeout_s))
    except _RefusedError as error:
        answer = {"error": str(error)}
    except KeyError as error:
        answer = {"error": f"the server's answer is not OpenML's (it has no {error})"}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {_line(error)}"}
    (Path(folder) / _ANSWER).write_text(json.dumps(answer))


if __name__ == "__main__":
    _main()
