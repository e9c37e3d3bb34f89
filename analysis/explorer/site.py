"""The explorer's pages over HTTP: addresses, and the page behind each.

Promises: everything is read-only; a wrong address or number is answered with a page that says so; only the explorer's
own script and style run or are requested, whatever a token holds; requests under an unknown host name are rejected, so
that no other web page can read a store through the visitor's browser (DNS rebinding).
"""

import ipaddress
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, get_args
from urllib.parse import quote, urlencode

import numpy as np
from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from analysis.explorer.compare import compared
from analysis.explorer.compared import verdict
from analysis.explorer.counting import Counting
from analysis.explorer.dataset import Order, documents
from analysis.explorer.document import distribution, document_page
from analysis.explorer.effect import comparable, effect_page
from analysis.explorer.home import Home
from analysis.explorer.index import index_folder
from analysis.explorer.live import Explorer, Shown, changes, differs
from analysis.explorer.maps import expert_map
from analysis.explorer.one_file import FOLDER, MOST_TOKENS, environment, export_page, reader_data, refuse_too_long
from analysis.explorer.phrases import LONGEST
from analysis.explorer.search import GLANCE, search_page
from analysis.explorer.token import contexts, token_page
from analysis.explorer.token_class import class_page, wrong_expression
from analysis.explorer.view import MIN_COUNT, Unreadable

ORDERS = get_args(Order)
AT_ONCE = 1  # pages rendered at the same time: more would only wait for Python's lock (measured)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def site(explorer: Explorer, names: Sequence[str] = ()) -> Starlette:
    """The explorer as an ASGI application, for requests by IP address, to localhost, and under these host names."""
    pages, turns = Pages(explorer), CapacityLimiter(AT_ONCE)

    # Pages that wait for a scan do not take a turn, and neither do quick ones.
    def in_turn(page: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return await to_thread.run_sync(page, request, limiter=turns)

        return answer

    routes = [
        Route("/", in_turn(pages.home)),
        Route("/-/state.json", pages.state),
        Route("/-/explorer.css", lambda _: FileResponse(FOLDER / "explorer.css", headers=HEADERS)),
        Route("/-/explorer.js", lambda _: FileResponse(FOLDER / "explorer.js", headers=HEADERS)),
        Route("/-/search", in_turn(pages.search_all)),
        Route("/-/compare", in_turn(pages.any_comparison)),
        Route("/{name}", in_turn(pages.dataset)),
        Route("/{name}/search", in_turn(pages.search)),
        Route("/{name}/document/{document:int}", in_turn(pages.document)),
        Route("/{name}/document/{document:int}/export", in_turn(pages.export)),
        Route("/{name}/place", in_turn(pages.place)),
        Route("/{name}/next", in_turn(pages.next)),
        Route("/{name}/distribution", in_turn(pages.distribution)),
        Route("/{name}/effect", in_turn(pages.effect)),
        Route("/{name}/token/{token:int}", in_turn(pages.token)),
        Route("/{name}/class", pages.token_class),
        Route("/{name}/compare/{other}", pages.compare),
        Route("/{name}/expert", in_turn(pages.any_expert)),
        Route("/{name}/expert/{layer:int}/{expert:int}", in_turn(pages.expert)),
    ]

    answers = {HTTPException: pages.error, ValueError: pages.error}
    return Starlette(routes=routes, middleware=[Middleware(ByName, names=names)], exception_handlers=answers)


class ByName:
    """Accepts requests by IP address, to localhost, and under some names; rejects all others.

    Parameters
    ----------
    app
        The application.
    names
        Host names of this machine.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        self.app, self.names = app, ("localhost", *names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        host = (Request(scope).url.hostname or "") if scope["type"] == "http" else ""
        if scope["type"] != "http" or host in self.names or _is_address(host):
            return await self.app(scope, receive, send)
        refused = PlainTextResponse(f"{host} is not a name of this machine", 400, headers=HEADERS)
        return await refused(scope, receive, send)


def _is_address(host: str) -> bool:
    """Whether it is an IP address, which needs no name service."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


class Pages:
    """One method per page; run by Starlette in threads."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer, self.templates, self.first = explorer, environment(), Home(explorer)
        folder = explorer.folder or index_folder(explorer.path)
        self.counting = Counting(folder, explorer.only, explorer.threads)

    def home(self, request: Request) -> Response:
        """The data sets, and what was found in them."""
        problems = {name: why for name, why in self.explorer.problems.items() if name not in self.explorer.shown}
        return self._page("home", "What do the experts do?", problems=problems, **self.first.page())

    def state(self, request: Request) -> Response:
        """The progress of all data sets, which pages poll."""
        return JSONResponse({"sets": [self.explorer.state(name) for name in [*self.explorer.shown]]}, headers=HEADERS)

    def dataset(self, request: Request) -> Response:
        """A data set: its experts and its documents."""
        shown, (page,) = self._shown(request), _numbers(request, page=1)
        view, known = shown.view, bool(shown.view.now.tokens)
        asked = request.query_params.get("name", "")
        by: Any = request.query_params.get("by", "unusual" if known else "id")
        if by not in ORDERS:
            raise HTTPException(400, f"by={by}: documents are ordered by {', '.join(ORDERS)}")
        unusual = shown.unusual if known else None
        return self._page(
            "dataset",
            view.dataset,
            shown,
            map=expert_map(view, shown.profiles.load["estimate"].values) if known else None,
            state=str(view.now.state),
            documents=documents(view, unusual, containing=asked, by=by, page=page),
            named=asked,
        )

    def search(self, request: Request) -> Response:
        """Tokens, places and documents that contain a text."""
        shown, (page,), asked = self._shown(request), _numbers(request, page=1), _asked(request)
        return self._page(
            "search",
            asked,
            shown,
            asked=asked,
            wrong=wrong_expression(asked),
            found=search_page(shown.view, asked, page),
        )

    def search_all(self, request: Request) -> Response:
        """The same in all data sets, a few results from each."""
        asked, shown = _asked(request), [*self.explorer.shown.values()]
        if len(shown) == 1:
            where = f"/{quote(shown[0].view.dataset)}/search?{urlencode({'q': asked})}"
            return RedirectResponse(where, headers=HEADERS)
        found = [search_page(each.view, asked, tokens=GLANCE, places=GLANCE) for each in shown]
        return self._page("search_all", asked, asked=asked, wrong=wrong_expression(asked), found=found)

    def document(self, request: Request) -> Response:
        """A page of a document's text."""
        shown, (page,) = self._shown(request), _numbers(request, page=1)
        found = document_page(shown.view, request.path_params["document"], page)
        title = found["name"] or f"document {found['document']}"
        others = [each.view for each in [*self.explorer.shown.values()]]
        found["against"] = [
            {"name": each.dataset, "differs": differs(shown.view, each)} for each in comparable(shown.view, others)
        ]
        data = reader_data(shown.view, [found])
        fits = found["tokens"] <= MOST_TOKENS
        return self._page("document", title, shown, document=found, data=data, can_be_saved=fits)

    def export(self, request: Request) -> Response:
        """A document as one file."""
        view, document = self._shown(request).view, request.path_params["document"]
        name = f"{view.dataset}-{document}.html"
        try:
            refuse_too_long(view, [document])
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        headers = {**HEADERS, "Content-Disposition": f'attachment; filename="{name}"'}
        return HTMLResponse(export_page(view, [document]), headers=headers)

    def place(self, request: Request) -> Response:
        """Redirect to the document page of a row's position."""
        shown, (row, position, layer) = self._shown(request), _numbers(request, row=0, position=0, layer=None)
        document, page, token = shown.view.page_at(row, position)
        query = {"page": page, "token": token} | ({} if layer is None else {"layer": layer})
        query |= {name: request.query_params[name] for name in ("by",) if name in request.query_params}
        where = f"/{quote(shown.view.dataset)}/document/{document}?{urlencode(query)}"
        return RedirectResponse(where, headers=HEADERS)

    def next(self, request: Request) -> Response:
        """Redirect to the next place of a token, or to the previous one."""
        shown = self._shown(request)
        token, row, position, back, layer = _numbers(request, token=None, row=0, position=0, back=0, layer=None)
        if token is None or token >= len(shown.view.texts):
            raise HTTPException(400, f"name a token below {len(shown.view.texts)}")
        row, position = shown.view.now.neighbour(token, row, position, back=bool(back))
        query = {"row": row, "position": position} | ({} if layer is None else {"layer": layer})
        return RedirectResponse(f"/{quote(shown.view.dataset)}/place?{urlencode(query)}", headers=HEADERS)

    def distribution(self, request: Request) -> Response:
        """What the routers computed for one token; requested when a token is selected."""
        shown, (row, position) = self._shown(request), _numbers(request, row=0, position=0)
        try:
            return JSONResponse(distribution(shown.view, row, position), headers=HEADERS)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 404, headers=HEADERS)

    def effect(self, request: Request) -> Response:
        """How another capture predicts a page of text; requested when that is selected as the colour."""
        shown, (row, start) = self._shown(request), _numbers(request, row=0, start=0)
        other = self.explorer.shown.get(request.query_params.get("against", ""))
        if other is None:
            raise HTTPException(404, "name another data set with against=")
        try:
            return JSONResponse(effect_page(shown.view, other.view, row, start), headers=HEADERS)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 404, headers=HEADERS)

    def token(self, request: Request) -> Response:
        """A token: the experts it goes to, and its places."""
        shown, (layer, expert, page) = self._shown(request), _numbers(request, layer=None, expert=None, page=1)
        view = shown.view
        token = token_page(view, request.path_params["token"])
        return self._page(
            "token",
            token["text"],
            shown,
            token=token,
            map=expert_map(view, np.array(token["counts"]) / max(1, token["of"])),
            found=contexts(view, token["id"], layer, expert, page),
            chosen_layer=layer,
            chosen_expert=expert,
            query={} if layer is None else {"layer": layer, "expert": expert},
        )

    def expert(self, request: Request) -> Response:
        """An expert's profile."""
        shown = self._shown(request)
        layer, expert = request.path_params["layer"], request.path_params["expert"]
        if not shown.view.now.tokens:
            raise HTTPException(503, f"nothing of {shown.view.dataset} is indexed yet: try again soon")
        found = shown.profiles.expert(layer, expert, self.explorer.alike(shown))
        return self._page(
            "expert",
            f"Expert {expert} of layer {layer}",
            shown,
            expert=found,
            min_count=MIN_COUNT,
            length=shown.view.capture.sizes["position"],
        )

    def compare(self, request: Request) -> Response:
        """Two data sets, or the progress of counting them."""
        shown, other = self._shown(request), self._shown(request, "other")
        names = shown.view.dataset, other.view.dataset
        if shown is other:
            raise HTTPException(400, f"{names[0]} cannot be compared with itself: name two different data sets")
        title, found = f"{names[0]} and {names[1]}", compared(self.counting, shown, other)
        if found is None:
            return self._counting(title, shown)
        differ, said = differs(shown.view, other.view), verdict(found, names)
        return self._page("compare", title, shown, other=names[1], found=found, differs=differ, said=said)

    def token_class(self, request: Request) -> Response:
        """A token class: the experts it goes to, and some places."""
        shown, (layer, expert), asked = (
            self._shown(request),
            _numbers(request, layer=None, expert=None),
            _asked(request),
        )
        found = class_page(self.counting, shown, asked, layer, expert)
        if found is None:
            return self._counting(asked, shown)
        return self._page("class", asked, shown, found=found, chosen_layer=layer, chosen_expert=expert)

    def _counting(self, title: str, shown: Shown) -> Response:
        """The page shown until the numbers are available."""
        done, total = self.counting.progress
        return self._page("counting", title, shown, done=done, total=total)

    def any_comparison(self, request: Request) -> Response:
        """Redirect to the comparison of the data sets that a form names."""
        one, other = (quote(request.query_params.get(name, ""), safe="") for name in ("one", "other"))
        return RedirectResponse(f"/{one or '-'}/compare/{other or '-'}", headers=HEADERS)

    def any_expert(self, request: Request) -> Response:
        """Redirect to the page of the expert that a form names."""
        shown, (layer, expert) = self._shown(request), _numbers(request, layer=None, expert=None)
        if layer is None or expert is None:
            raise HTTPException(400, "name a layer and an expert")
        return RedirectResponse(f"/{shown.view.dataset}/expert/{layer}/{expert}", headers=HEADERS)

    def error(self, request: Request, error: Exception) -> Response:
        """The error page."""
        status = (
            error.status_code if isinstance(error, HTTPException) else 500 if isinstance(error, Unreadable) else 404
        )
        message = error.detail if isinstance(error, HTTPException) else str(error)
        message = f"The explorer has no page {request.url.path}." if message == "Not Found" else message
        titles = {
            400: "Invalid request",
            404: "Not found",
            500: "Cannot be read",
            503: "Not available yet",
        }
        title = titles.get(status, "Error")
        return self._page("error", title, status=status, message=message)

    def _shown(self, request: Request, part: str = "name") -> Shown:
        """The data set that an address names."""
        name, shown = request.path_params[part], self.explorer.shown
        if name not in shown:
            raise HTTPException(404, f"no data set {name!r}: available are {', '.join(shown)}")
        return shown[name]

    def _page(
        self, template: str, title: str, shown: Shown | None = None, status: int = 200, **values: Any
    ) -> HTMLResponse:
        """Render a page with the values that all pages share."""
        about: Mapping[str, Any] = {"name": None, "behind": False, "changes": "", "selected": self.explorer.only.said}
        if shown is not None:
            view = shown.view
            about = {
                **about,
                "name": view.dataset,
                "indexed": view.now.tokens,
                "behind": len(view.now.parts) < view.now.state.shards_done,
                "experts": view.experts,
                "choices": view.choices,
                "layers": view.layers,
                "changes": changes(view),
            }
        names = [*self.explorer.shown]
        sets = [shown] if shown is not None else [self.explorer.shown[name] for name in names]
        digests = " ".join(each.digest for each in sets)
        page = self.templates.get_template(f"{template}.html.jinja").render(
            {"title": title, "names": names, "digests": digests, "asked": "", **about, **values}
        )
        return HTMLResponse(page, status, headers=HEADERS)


def _asked(request: Request) -> str:
    """The text to search for."""
    asked = request.query_params.get("q", "").replace("\0", "")  # no text contains it
    if not asked:
        raise HTTPException(400, "the search is empty: enter part of a text, a token or a document name")
    if len(asked) > LONGEST:
        raise HTTPException(400, f"the search text has {len(asked):,} characters; the limit is {LONGEST}")
    return asked


def _numbers(request: Request, **defaults: int | None) -> list[Any]:
    """Whole numbers of an address's query, in this order."""
    found = []
    for name, default in defaults.items():
        text = request.query_params.get(name, "")
        if text and not (text.isascii() and text.isdecimal() and len(text) < 16):
            raise HTTPException(400, f"{name}={text} is not a whole number of 0 or more")
        found.append(int(text) if text else default)
    return found
