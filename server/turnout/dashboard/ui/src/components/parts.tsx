/** Small parts that every page uses. */

import type { ComponentChildren } from "preact";
import type { ApiError, RunStatus } from "../api/client";
import { plain, time, utc } from "../lib/format";

const STATUS: Record<RunStatus, { sign: string; word: string; about: string }> = {
  running: { sign: "●", word: "live", about: "A process works on it." },
  stale: { sign: "◐", word: "stale", about: "It has not committed a round for long: it waits for clients, or hangs." },
  lost: { sign: "○", word: "lost", about: "No process works on it any more, although nothing ended it." },
  finished: { sign: "✓", word: "done", about: "It finished." },
  interrupted: { sign: "‖", word: "interrupted", about: "It was stopped and can be resumed." },
  failed: { sign: "✕", word: "failed", about: "An error ended it." },
};

export function Status({ status }: { status: RunStatus }) {
  const { sign, word, about } = STATUS[status];
  return (
    <span class={`status status-${status}`} title={about}>
      <span class="sign" aria-hidden="true">
        {sign}
      </span>
      {word}
    </span>
  );
}

export function When({ at }: { at: string | null | undefined }) {
  return (
    <time dateTime={at ?? undefined} title={utc(at)}>
      {time(at)}
    </time>
  );
}

/** A name from outside: its letters and nothing else of it count, in its own direction. */
export function Name({ text }: { text: string }) {
  return (
    <bdi class="name" title={plain(text)}>
      {plain(text)}
    </bdi>
  );
}

export function Tile({ label, children, note }: { label: string; children: ComponentChildren; note?: ComponentChildren }) {
  return (
    <div class="tile">
      <dt>{label}</dt>
      <dd>
        {children}
        {note != null && <span class="note">{note}</span>}
      </dd>
    </div>
  );
}

export function Section(props: { title: string; id: string; tools?: ComponentChildren; children: ComponentChildren }) {
  return (
    <section class="card" aria-labelledby={`${props.id}-title`}>
      <header>
        <h2 id={`${props.id}-title`}>{props.title}</h2>
        {props.tools && <div class="tools">{props.tools}</div>}
      </header>
      {props.children}
    </section>
  );
}

/** What stands where a document is not yet, or not at all. */
export function Pending({ error, retry }: { error: ApiError | null; retry: () => void }) {
  if (!error) {
    return (
      <p class="pending" role="status">
        Loading …
      </p>
    );
  }
  return (
    <div class="failure" role="alert">
      <p>
        <span aria-hidden="true">⚠ </span>
        {plain(error.message)}
      </p>
      <button type="button" onClick={retry}>
        Try again
      </button>
    </div>
  );
}

/** One of a few: a group of buttons of which one is pressed. */
export function Choice<T extends string>(props: {
  label: string;
  options: readonly (readonly [T, string])[];
  value: T;
  onChange: (value: T) => void;
}) {
  return (
    <div class="choice" role="group" aria-label={props.label}>
      {props.options.map(([value, words]) => (
        <button
          key={value}
          type="button"
          aria-pressed={value === props.value}
          onClick={() => props.onChange(value)}
        >
          {words}
        </button>
      ))}
    </div>
  );
}

export function Select(props: {
  label: string;
  value: string;
  options: readonly (readonly [string, string])[];
  onChange: (value: string) => void;
}) {
  return (
    <label class="select">
      <span>{props.label}</span>
      <select value={props.value} onChange={(event) => props.onChange(event.currentTarget.value)}>
        {props.options.map(([value, words]) => (
          <option key={value} value={value}>
            {plain(words)}
          </option>
        ))}
      </select>
    </label>
  );
}
