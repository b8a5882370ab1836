/** One stream per page with everything that is new in it; without a stream the page asks every few seconds. */

import type { components } from "./schema";
import { api, ApiError, get } from "./client";

export type Update = components["schemas"]["Update"];
export type Resync = components["schemas"]["Resync"];
export type LiveState = "connecting" | "live" | "reconnecting" | "polling" | "paused";

export interface LiveListener {
  update?: (update: Update) => void;
  /** Something was missed: load again what is shown of these runs (of all, when empty). */
  resync?: (runs: string[]) => void;
}

const OPENS_WITHIN = 5_000;
const POLL_EVERY = 3_000;
const POLLS_UNTIL_TRIED_AGAIN = 10;
const HIDDEN_FOR = 60_000;
const RETRY_FIRST = 1_000;
const RETRY_LAST = 10_000;

export class LiveFeed {
  private source: EventSource | null = null;
  private readonly listeners = new Set<LiveListener>();
  private runs: string[] | null = null;
  private cursor = "";
  private timer = 0;
  private hideTimer = 0;
  private retry = RETRY_FIRST;
  private opened = false;
  state: LiveState = "connecting";
  lastContact = Date.now();

  constructor(private readonly onState: (state: LiveState) => void) {
    document.addEventListener("visibilitychange", () => this.visibility());
  }

  subscribe(listener: LiveListener): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  /** Follows `runs` from now on (the run list, when empty). */
  follow(runs: string[]): void {
    if (this.runs?.join() === runs.join()) return;
    this.runs = runs;
    this.cursor = "";
    this.retry = RETRY_FIRST;
    this.open();
  }

  /** Tries again now: after a login, or when the reader asks for it. */
  retryNow(): void {
    this.retry = RETRY_FIRST;
    if (this.runs) this.open();
  }

  stop(): void {
    this.source?.close();
    this.source = null;
    clearTimeout(this.timer);
  }

  private open(): void {
    this.stop();
    const source = new EventSource(api("stream", { run: this.runs ?? [], after: this.cursor }));
    this.source = source;
    this.opened = false;
    this.timer = window.setTimeout(() => void this.poll(), OPENS_WITHIN);
    source.onopen = () => this.alive();
    source.onerror = () => this.failed(source);
    source.addEventListener("update", (event) => {
      const update = this.parsed<Update>(event);
      for (const listener of this.listeners) listener.update?.(update);
    });
    source.addEventListener("resync", (event) => this.resync(this.parsed<Resync>(event).runs));
    source.addEventListener("hello", (event) => void this.parsed(event));
    source.addEventListener("bye", () => this.failed(source));
  }

  private parsed<T>(event: MessageEvent): T {
    if (event.lastEventId) this.cursor = event.lastEventId;
    this.alive();
    return JSON.parse(event.data as string) as T;
  }

  private alive(): void {
    this.lastContact = Date.now();
    if (this.opened) return;
    this.opened = true;
    this.retry = RETRY_FIRST;
    clearTimeout(this.timer);
    this.to("live");
  }

  private resync(runs: string[]): void {
    for (const listener of this.listeners) listener.resync?.(runs);
  }

  /** Opens the stream again after a while, from the last message on: the server goes on from there. */
  private failed(source: EventSource): void {
    if (source !== this.source) return;
    const refused = !this.opened && this.state !== "reconnecting";
    this.stop();
    if (!refused) this.to("reconnecting");
    // A stream does not tell why it failed: ask whether the server is away, or a login needed by now.
    get(api("info")).catch(() => this.source === null && this.to("reconnecting"));
    this.timer = window.setTimeout(() => this.open(), this.retry);
    this.retry = Math.min(2 * this.retry, RETRY_LAST);
  }

  /** The stream does not open (a proxy holds it back, say): everything shown is loaded again and again. */
  private async poll(turn = 1): Promise<void> {
    this.stop();
    try {
      await get(api("info"));
      this.lastContact = Date.now();
      this.to("polling");
      this.resync([]);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.to("reconnecting");
    }
    const next = turn % POLLS_UNTIL_TRIED_AGAIN === 0 ? () => this.open() : () => void this.poll(turn + 1);
    this.timer = window.setTimeout(next, POLL_EVERY);
  }

  private visibility(): void {
    clearTimeout(this.hideTimer);
    if (document.hidden) {
      this.hideTimer = window.setTimeout(() => {
        this.stop();
        this.to("paused");
      }, HIDDEN_FOR);
    } else if (this.state === "paused") {
      this.to("connecting");
      this.open();
    }
  }

  private to(state: LiveState): void {
    if (state === this.state) return;
    this.state = state;
    this.onState(state);
  }
}
