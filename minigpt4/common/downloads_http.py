"""What servers say of a file, and the ways there: redirects, Google Drive's forms."""

import base64
import html.parser
import http.client
import http.cookiejar
import re
import urllib.parse
import urllib.request
from dataclasses import dataclass

from minigpt4.common.errors import WeightsError

DRIVE = "https://drive.usercontent.google.com/download"


@dataclass(frozen=True)
class Remote:
    """What the server said of the file; kept beside a part, to see whether the rest still belongs to it."""

    source: str
    etag: str | None = None
    total: int | None = None
    md5: str | None = None
    sha256: str | None = None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Remembers, on the first request, the hash that Hugging Face names while it redirects to its storage."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None:
            following.first = getattr(req, "first", req)
            if linked := headers.get("X-Linked-ETag"):
                following.first.linked_etag = linked
        return following


def make_opener() -> urllib.request.OpenerDirector:
    """An opener that follows redirects, keeps cookies and honours the proxy variables of the environment."""
    cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
    opener = urllib.request.build_opener(_Redirects, cookies)
    opener.addheaders = [("User-Agent", "minigpt4-download"), ("Accept-Encoding", "identity")]
    return opener


def describe(response: http.client.HTTPResponse, request: urllib.request.Request, source: str) -> Remote:
    """Length and hashes of the whole file, as far as the answer (also a partial one) tells them."""
    headers = response.headers
    if response.status == 206:
        total = (headers.get("Content-Range") or "").rpartition("/")[2]
    else:
        total = headers.get("Content-Length") or ""
    etag = headers.get("ETag") or ""
    return Remote(
        source=source,
        etag=etag if etag.startswith('"') else None,  # a weak one (W/"...") may not be used with If-Range
        total=int(total) if total.isdigit() else None,
        md5=_reported_md5(response),
        sha256=_reported_sha256(response, request),
    )


def range_start(response: http.client.HTTPResponse) -> int | None:
    """The offset at which a partial answer (206) begins."""
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    return int(found[1]) if found else None


def _reported_md5(response: http.client.HTTPResponse) -> str | None:
    """Hex MD5 of the whole file: Google's `x-goog-hash`, or Content-MD5 of a full answer."""
    goog = ",".join(response.headers.get_all("x-goog-hash", []))
    found = re.search(r"\bmd5=([A-Za-z0-9+/]{22}==)", goog)
    value = found[1] if found else None
    if value is None and response.status == 200:
        value = response.headers.get("Content-MD5")
    try:
        return base64.b64decode(value, validate=True).hex() if value else None
    except ValueError:
        return None


def _reported_sha256(response: http.client.HTTPResponse, request: urllib.request.Request) -> str | None:
    """Hugging Face's ETag of a large file is its sha256; other servers' ETags mean nothing."""
    headers = response.headers
    linked = getattr(request, "linked_etag", None) or headers.get("X-Linked-ETag")
    if linked is None and headers.get("X-Repo-Commit"):
        linked = headers.get("ETag")
    found = re.fullmatch(r'"?([0-9a-f]{64})"?', linked or "")
    return found[1] if found else None


def drive_url(opener: urllib.request.OpenerDirector, file_id: str, timeout: float, base: str = DRIVE) -> str:
    """Where the bytes of a shared Google Drive file come from, past the page that large files put before it.

    Raises:
        WeightsError: the page offers no download (quota used up, or not shared any more).
        urllib.error.HTTPError, OSError: as the server or the connection has it.
    """
    url = f"{base}?{urllib.parse.urlencode({'id': file_id, 'export': 'download', 'confirm': 't'})}"
    with opener.open(url, timeout=timeout) as response:
        if response.headers.get_content_type() != "text/html":
            return url
        form = _DownloadForm()
        form.feed(response.read(1 << 20).decode("utf-8", "replace"))
    if not form.action:
        raise WeightsError(
            f"Google Drive sends a web page in place of the file {file_id}: its download quota is used up, "
            "or it is no longer shared. Try again in a day, or open "
            f"https://drive.google.com/file/d/{file_id}/view in a browser and put the file into the folder"
        )
    action = urllib.parse.urljoin(url, form.action)
    return f"{action}?{urllib.parse.urlencode(form.fields)}" if form.fields else action


class _DownloadForm(html.parser.HTMLParser):
    """The form `download-form` of the virus scan page: its address and its hidden fields (with the token)."""

    def __init__(self) -> None:
        super().__init__()
        self.action = ""
        self.fields: dict[str, str] = {}
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if tag == "form" and found.get("id") == "download-form":
            self._inside, self.action = True, found.get("action", "")
        if tag == "input" and self._inside and "name" in found:
            self.fields[found["name"]] = found.get("value", "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._inside = False
