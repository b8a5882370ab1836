/** The frame around every page: navigation, live state, theme, shortcuts, login. */

import { useEffect, useRef, useState } from "preact/hooks";
import type { Info, Session } from "./api/client";
import { api, logOut, onLoginNeeded } from "./api/client";
import type { LiveState } from "./api/live";
import { useLoad } from "./api/load";
import { ShortcutsDialog } from "./components/shortcuts-dialog";
import { choice, choose, type Choice } from "./lib/palette";
import { useShortcuts } from "./lib/shortcuts";
import { LiveContext, useFeed } from "./live";
import { ComparePage } from "./pages/compare";
import { LoginPage } from "./pages/login";
import { MethodsPage } from "./pages/methods";
import { RunPage } from "./pages/run";
import { RunsPage } from "./pages/runs";
import { address, go, interceptLinks, list, useParams } from "./router";

const THEMES: Record<Choice, [sign: string, words: string]> = {
  system: ["◐", "Theme: as the system has it"],
  light: ["○", "Theme: light"],
  dark: ["●", "Theme: dark"],
};
const NEXT: Record<Choice, Choice> = { system: "dark", dark: "light", light: "system" };

const LIVE: Record<LiveState, [sign: string, words: string]> = {
  connecting: ["◌", "connecting"],
  live: ["●", "live"],
  reconnecting: ["↻", "reconnecting"],
  polling: ["●", "live, by asking"],
  paused: ["‖", "paused"],
};

export function App() {
  const query = useParams();
  const page = query.get("page") ?? "runs";
  const session = useLoad<Session>(api("session"));
  const [expired, setExpired] = useState(false);
  const login = expired || (session.data != null && session.data.required && !session.data.authenticated);
  const ready = session.data != null && !login;
  const { feed, state } = useFeed(ready && page !== "methods" ? followed(page, query) : null);
  const [help, setHelp] = useState(false);
  const [themed, setThemed] = useState(choice());
  const turn = () => {
    choose(NEXT[choice()]);
    setThemed(choice());
  };

  useEffect(() => onLoginNeeded(() => setExpired(true)), []);
  useShortcuts({
    "?": () => setHelp((open) => !open),
    g: () => go("?"),
    m: () => go("?page=methods"),
    t: turn,
  });
  useHeading(`${page} ${query.get("run") ?? ""} ${query.get("client") ?? ""}`);

  const entered = () => {
    setExpired(false);
    session.reload();
    feed.retryNow();
  };
  return (
    <LiveContext.Provider value={feed}>
      <div class="frame" onClick={interceptLinks}>
        <a class="skip" href="#main">
          Skip to content
        </a>
        <header class="bar">
          <a class="brand" href="?" aria-label="Turnout">
            <img src={new URL("./icon.svg", import.meta.url).href} alt="" width="20" height="20" />
            <span class="words">Turnout</span>
          </a>
          <nav aria-label="Pages">
            <NavLink to="" page="runs" now={page === "run" ? "runs" : page} words="Runs" />
            <NavLink to="compare" page="compare" now={page} words="Compare" />
            <NavLink to="methods" page="methods" now={page} words="Methods" />
          </nav>
          <span class="grow" />
          {ready && page !== "methods" && <LiveSign state={state} />}
          <button type="button" class="icon" onClick={turn} aria-label={THEMES[themed][1]} title={`${THEMES[themed][1]} (t)`}>
            {THEMES[themed][0]}
          </button>
          <button type="button" class="icon" onClick={() => setHelp(true)} aria-label="Keyboard shortcuts" title="Keyboard shortcuts (?)">
            ?
          </button>
          {session.data?.required && !login && <LogoutButton done={() => setExpired(true)} />}
        </header>
        {ready && state === "reconnecting" && <Banner since={feed.lastContact} retry={() => feed.retryNow()} />}
        <main id="main" tabIndex={-1}>
          {login ? <LoginPage entered={entered} /> : <Page page={page} query={query} />}
        </main>
        <Footer />
        {help && <ShortcutsDialog close={() => setHelp(false)} />}
      </div>
    </LiveContext.Provider>
  );
}

function Page({ page, query }: { page: string; query: URLSearchParams }) {
  const run = query.get("run");
  if (page === "run" && run) return <RunPage key={run} id={run} query={query} />;
  if (page === "compare") return <ComparePage query={query} />;
  if (page === "methods") return <MethodsPage query={query} />;
  if (page === "runs") return <RunsPage query={query} />;
  return (
    <div class="empty">
      <h1 tabIndex={-1}>No such page</h1>
      <p>
        The address names a page that there is not. <a href="?">See all runs.</a>
      </p>
    </div>
  );
}

function followed(page: string, query: URLSearchParams): string[] {
  if (page === "run") return [query.get("run") ?? ""].filter(Boolean);
  return page === "compare" ? list(query.get("runs")) : [];
}

/** Moves the focus to the heading of a page that was navigated to, so that a screen reader says it. */
function useHeading(key: string): void {
  const first = useRef(true);
  useEffect(() => {
    if (first.current) {
      first.current = false;
      return;
    }
    document.querySelector<HTMLElement>("main h1")?.focus({ preventScroll: true });
  }, [key]);
}

function NavLink({ to, page, now, words }: { to: string; page: string; now: string; words: string }) {
  return (
    <a href={address({ page: to })} aria-current={now === page ? "page" : undefined}>
      {words}
    </a>
  );
}

function LiveSign({ state }: { state: LiveState }) {
  const [sign, words] = LIVE[state];
  return (
    <span class={`live live-${state}`} role="status">
      <span aria-hidden="true">{sign}</span> {words}
    </span>
  );
}

function Banner({ since, retry }: { since: number; retry: () => void }) {
  const [at] = useState(() => new Date(since).toLocaleTimeString(undefined, { hour12: false }));
  return (
    <div class="banner" role="alert">
      <span>
        The server has not answered since {at}. Reconnecting; what you see may be old, and nothing is lost: the page
        catches up.
      </span>
      <button type="button" onClick={retry}>
        Try now
      </button>
    </div>
  );
}

function LogoutButton({ done }: { done: () => void }) {
  const leave = () => void logOut().then(done, done);
  return (
    <button type="button" onClick={leave}>
      Log out
    </button>
  );
}

function Footer() {
  const info = useLoad<Info>(api("info"));
  return (
    <footer>
      {info.data && (
        <span>
          Turnout {info.data.version} · {info.data.store} · read-only
        </span>
      )}
      <a href="./THIRD_PARTY_LICENSES.txt">Licences</a>
    </footer>
  );
}
