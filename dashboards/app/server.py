"""How does a browser get the pages? One Dash app; the address decides what it shows."""

from __future__ import annotations

import hmac
import io
import logging
import threading
import traceback
from importlib import resources
from typing import Any
from urllib.parse import urlencode

import dash
import flask
from dash import ALL, Input, Output, State, dcc, html, no_update
from werkzeug.serving import BaseWSGIServer, make_server

from dashboards import theme
from dashboards.app import controls, pages, plan_page, system_pages
from dashboards.app.parts import Alarm, Panel, Part
from dashboards.app.render import rendered, standalone
from dashboards.app.state import State as Looked
from dashboards.app.store import Store
from dashboards.app.view import View, warnings
from mooncake_bench.opened import RUNNING
from mooncake_bench.records import RecordsError

PAGES = {
    "overview": ("Overview", pages.overview),
    "slo": ("SLO", pages.slo),
    "latency": ("Latency", pages.latency),
    "request": ("Request", pages.request),
    "cluster": ("Cluster", system_pages.cluster),
    "cache": ("Cache", system_pages.cache),
    "rejections": ("Rejections", system_pages.rejections),
    "plan": ("Plan", plan_page.plan),
}
TITLES = {name: title for name, (title, _) in PAGES.items()}
LOCAL = ("127.0.0.1", "localhost", "::1")
LIVE_EVERY_MS, IDLE_EVERY_MS = 500, 2500
COOKIE = "mooncake_bench_token"
PLOTLY = "/_dash-component-suites/plotly/package_data/plotly.min.js"
"""Where Dash has it; the index asks for it at once, Dash itself only with the first figure."""

log = logging.getLogger(__name__)


def build(store: Store, token: str = "") -> dash.Dash:
    """The app over the store's runs; with a token it answers nobody who does not have it."""
    # What the first page asks is found while the browser still loads the script.
    first = threading.Thread(
        target=lambda: parts_of(View.of(store, Looked())), name="first-page", daemon=True
    )
    first.start()
    server = flask.Flask(__name__)
    _guard(server, token)
    app = dash.Dash(
        __name__,
        server=server,
        title="mooncake-bench",
        update_title="",
        serve_locally=True,
        suppress_callback_exceptions=True,
        assets_folder="",
        compress=False,
    )
    app.index_string = _index()
    app.layout = _layout
    _show(app, store)
    _listen(app, store)
    _serve_exports(server, store)
    return app


def serve(app: dash.Dash, host: str, port: int) -> BaseWSGIServer:
    """A server that listens; port 0 takes a free one. Raises OSError."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    return make_server(host, port, app.server, threaded=True)


def _layout() -> Any:
    return html.Div(
        [
            dcc.Location(id="address", refresh="callback-nav"),
            dcc.Interval(id="tick", interval=IDLE_EVERY_MS),
            dcc.Store(id="shown", data=""),
            dcc.Store(id="dressed", data=""),
            html.A("Skip to the page", href="#page", className="skip"),
            html.Header([html.H1("mooncake-bench"), html.Nav(id="navigation")]),
            html.Div(id="controls", className="controls", role="form"),
            # Announced, not shown: the controls' answer is beside them for eyes only.
            html.Main(id="page", tabIndex=-1),
        ]
    )


def _show(app: dash.Dash, store: Store) -> None:
    """From the address to the page, its links and its controls."""
    here = (Input("address", "pathname"), Input("address", "search"))

    @app.callback(
        Output("page", "children"),
        Output("shown", "data"),
        Output("tick", "interval"),
        *here,
        Input("tick", "n_intervals"),
        State("shown", "data"),
    )  # type: ignore[untyped-decorator]  # Dash's
    def show_page(path: str, search: str, _: int | None, shown: str) -> Any:
        view = View.of(store, Looked.of(search), path or "/")
        version = version_of(view)
        if version == shown:
            return no_update
        parts = parts_of(view)
        page = rendered(parts, _export_query(view))
        is_live = any(side.shown.run.state == RUNNING for side in view.sides)
        return page, version, LIVE_EVERY_MS if is_live else IDLE_EVERY_MS

    @app.callback(
        Output("navigation", "children"),
        Output("controls", "children"),
        Output("dressed", "data"),
        *here,
        State({"control": ALL}, "value"),
        State({"control": ALL}, "id"),
        State("dressed", "data"),
    )  # type: ignore[untyped-decorator]  # Dash's
    def show_controls(
        path: str, search: str, values: list[Any], ids: list[dict[str, str]], dressed: str
    ) -> Any:
        view = View.of(store, Looked.of(search), path or "/")
        page = page_of(view.path)
        links = controls.navigation(view, page, TITLES)
        known = {one["control"]: value for one, value in zip(ids, values, strict=True)}
        # What they depend on beside their values: which runs can be chosen, and which are.
        dress = f"{page}/{len(store.runs())}/{[side.key for side in view.sides]}"
        if dressed == dress and not controls.changes(view, known):
            return links, no_update, no_update
        return links, controls.controls(view, page), dress

    app.clientside_callback(
        "function(search) { return window.mooncakeTheme(search); }",
        Output("navigation", "title"),
        Input("address", "search"),
    )


def _listen(app: dash.Dash, store: Store) -> None:
    """From what is touched to the address."""

    @app.callback(
        Output("address", "search"),
        Input({"control": ALL}, "value"),
        State({"control": ALL}, "id"),
        State("address", "pathname"),
        State("address", "search"),
        prevent_initial_call=True,
    )  # type: ignore[untyped-decorator]  # Dash's
    def to_address(values: list[Any], ids: list[dict[str, str]], path: str, search: str) -> Any:
        view = View.of(store, Looked.of(search), path or "/")
        known = {one["control"]: value for one, value in zip(ids, values, strict=True)}
        # Only what was touched: controls that were just built say nothing new.
        touched = {one["control"] for one in dash.callback_context.triggered_prop_ids.values()}
        changed = controls.changes(view, {n: v for n, v in known.items() if n in touched})
        if not changed:
            return no_update
        if "run" in changed:
            changed["request"] = -1
        return view.state.with_(**changed).search

    @app.callback(
        Output("address", "pathname"),
        Output("address", "search", allow_duplicate=True),
        Input({"figure": ALL}, "clickData"),
        State("address", "pathname"),
        State("address", "search"),
        prevent_initial_call=True,
    )  # type: ignore[untyped-decorator]  # Dash's
    def follow(clicked: list[Any], path: str, search: str) -> Any:
        state = Looked.of(search)
        triggered = dash.callback_context.triggered_prop_ids
        if not any(clicked) or not triggered:
            return no_update, no_update
        key = next(iter(triggered.values()))["figure"]
        point = dash.callback_context.triggered[0]["value"]["points"][0]
        data = point.get("customdata") or _cell_of(View.of(store, state, path or "/"), key, point)
        if not isinstance(data, list) or len(data) < 2:
            return no_update, no_update
        if data[0] == "slo":
            return path, state.with_(ttft=data[1], tbt=data[2] * 1e3).search
        return "/request", state.with_(run=data[0], request=data[1]).search


def _cell_of(view: View, key: str, point: dict[str, Any]) -> list[Any] | None:
    """What a cell of a heat map stands for: Dash's clicks tell its place only."""
    panel = panels_of(view).get(key)
    trace = panel.figure.data[point["curveNumber"]] if panel is not None else None
    if trace is None or trace.type != "heatmap":
        return None
    try:
        row, column = list(trace.y).index(point["y"]), list(trace.x).index(point["x"])
    except ValueError:
        return None  # It was drawn anew meanwhile.
    found: list[Any] | None = trace.customdata[row][column]
    return found


def page_of(path: str) -> str:
    """The page's name in an address; what is not known is the overview."""
    name = path.strip("/").split("/")[0]
    return name if name in PAGES else "overview"


def version_of(view: View) -> str:
    """Changes with whatever would make the page look different."""
    keys = view.store.runs()
    runs = [f"{side.key}:{side.shown.run.version}" for side in view.sides]
    problems = [one.problem for one in view.broken]
    return f"{page_of(view.path)}{view.state.search}|{runs}|{problems}|{list(keys)}"


def parts_of(view: View) -> list[Part]:
    """All parts of the page; what went wrong in making it is a line on it."""
    if not view.store.runs() and not view.store.plans():
        where = ", ".join(str(root) for root in view.store.roots)
        return [Alarm("No run here", [f"{where}: neither a run directory nor one of runs"])]
    try:
        return [*warnings(view), *PAGES[page_of(view.path)][1](view)]
    except RecordsError as error:
        return [Alarm("This page cannot be shown", [str(error)])]
    except Exception as error:  # noqa: BLE001  # A page of one broken run must not end the others.
        log.error("%s", traceback.format_exc())
        return [Alarm("This page cannot be shown", [f"{type(error).__name__}: {error}"])]


def panels_of(view: View) -> dict[str, Panel]:
    """The page's figures by their key."""
    return {part.key: part for part in parts_of(view) if isinstance(part, Panel)}


def _export_query(view: View) -> str:
    search = view.state.search
    return f"{search}{'&' if search else '?'}page={page_of(view.path)}"


def _serve_exports(server: flask.Flask, store: Store) -> None:
    @server.route("/export/<kind>/<path:key>")
    def export(kind: str, key: str) -> flask.Response:
        query = flask.request.query_string.decode()
        view = View.of(store, Looked.of(query), flask.request.args.get("page", "overview"))
        part = panels_of(view).get(key)
        makers = {"html": _html, "csv": _csv, "parquet": _parquet}
        if part is None or kind not in makers:
            return flask.Response("There is no such figure.\n", 404, mimetype="text/plain")
        content, mimetype = makers[kind](part)
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in key)
        headers = {"Content-Disposition": f'attachment; filename="{name}.{kind}"'}
        return flask.Response(content, mimetype=mimetype, headers=headers)


def _html(part: Panel) -> tuple[bytes, str]:
    return standalone(part).encode(), "text/html"


def _csv(part: Panel) -> tuple[bytes, str]:
    return part.frame.write_csv().encode(), "text/csv"


def _parquet(part: Panel) -> tuple[bytes, str]:
    file = io.BytesIO()
    part.frame.write_parquet(file)
    return file.getvalue(), "application/vnd.apache.parquet"


def _guard(server: flask.Flask, token: str) -> None:
    """Without a token only this machine may ask, by its own name; with one, who has it."""

    @server.before_request
    def check() -> flask.Response | None:
        request = flask.request
        if not token:
            # A page elsewhere may have its name lead here: then the name gives it away.
            host = request.host.rsplit(":", 1)[0].strip("[]")
            return None if host in LOCAL else _refused("This server answers on 127.0.0.1 only.")
        asked = request.args.get("token", "")
        known = asked or request.cookies.get(COOKIE, "")
        if not hmac.compare_digest(known.encode(), token.encode()):
            return _refused("Open the address with the token that the server printed.")
        if asked:
            kept = urlencode({k: v for k, v in request.args.items() if k != "token"})
            answer = flask.redirect(f"{request.path}?{kept}" if kept else request.path)
            answer.set_cookie(COOKIE, token, httponly=True, samesite="Strict")
            return answer  # type: ignore[return-value]  # Werkzeug's is Flask's here
        return None

    @server.after_request
    def harden(response: flask.Response) -> flask.Response:
        response.headers["Content-Security-Policy"] = (
            "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
            "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
            "font-src 'self' data:; frame-ancestors 'none'"
        )
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response


def _refused(text: str) -> flask.Response:
    return flask.Response(text + "\n", 403, mimetype="text/plain")


def _index() -> str:
    files = resources.files("dashboards.app")
    style = theme.stylesheet() + files.joinpath("app.css").read_text(encoding="utf-8")
    script = files.joinpath("app.js").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n{%metas%}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n<title>{%title%}</title>\n{%css%}\n'
        f"<style>\n{style}</style>\n<script>\n{script}</script>\n"
        f'<script src="{PLOTLY}" defer></script>\n</head>\n<body>\n'
        "{%app_entry%}\n{%config%}\n{%scripts%}\n{%renderer%}\n</body>\n</html>\n"
    )
