/** Requests to the API of the server that this page came from. */

import type { components } from "./schema";

type Schemas = components["schemas"];
export type RunSummary = Schemas["RunSummary"];
export type RunDetail = Schemas["RunDetail"];
export type RunList = Schemas["RunList"];
export type RunStatus = RunSummary["status"];
export type RoundItem = Schemas["RoundItem"];
export type RoundPage = Schemas["RoundPage"];
export type Series = Schemas["Series"];
export type SeriesSummary = Schemas["SeriesSummary"];
export type SeriesList = Schemas["SeriesList"];
export type EventItem = Schemas["EventItem"];
export type EventPage = Schemas["EventPage"];
export type ParticipationLayout = Schemas["ParticipationLayout"];
export type ClientSummary = Schemas["ClientSummary"];
export type ClientPage = Schemas["ClientPage"];
export type ClientDetail = Schemas["ClientDetail"];
export type ClientRoundItem = Schemas["ClientRoundItem"];
export type ClientRoundPage = Schemas["ClientRoundPage"];
export type Fairness = Schemas["Fairness"];
export type Attention = Schemas["Attention"];
export type ConfigDiff = Schemas["ConfigDiff"];
export type Comparison = Schemas["Comparison"];
export type MethodList = Schemas["MethodList"];
export type Info = Schemas["Info"];
export type Session = Schemas["Session"];

export type Query = Record<string, string | number | boolean | null | undefined | readonly string[]>;

/** What the API answered instead of a document; status 0 means that it did not answer. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

const loginListeners = new Set<() => void>();

/** Calls `listener` when the API asks for a login. */
export function onLoginNeeded(listener: () => void): () => void {
  loginListeners.add(listener);
  return () => loginListeners.delete(listener);
}

/** The address of a part of the API, relative to the page: it may live under a proxy's prefix. */
export function api(path: string, query: Query = {}): string {
  const search = new URLSearchParams();
  for (const [key, value] of Object.entries(query)) {
    if (value == null || value === "") continue;
    if (Array.isArray(value)) for (const item of value as string[]) search.append(key, item);
    else search.set(key, String(value));
  }
  const text = search.toString();
  return `api/v1/${path}${text && `?${text}`}`;
}

export async function request(url: string, init: RequestInit = {}): Promise<Response> {
  let answer: Response;
  try {
    answer = await fetch(url, { credentials: "same-origin", ...init });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new ApiError(0, "The dashboard's server does not answer.");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) for (const listener of loginListeners) listener();
  throw new ApiError(answer.status, await problem(answer));
}

export async function get<T>(url: string, signal?: AbortSignal): Promise<T> {
  const answer = await request(url, signal ? { signal } : {});
  return (await answer.json()) as T;
}

export async function logIn(token: string): Promise<void> {
  const body = JSON.stringify({ token });
  await request(api("session"), { method: "POST", headers: { "content-type": "application/json" }, body });
}

export async function logOut(): Promise<void> {
  await request(api("session"), { method: "DELETE" });
}

async function problem(answer: Response): Promise<string> {
  try {
    const { error } = (await answer.json()) as Schemas["ErrorBody"];
    const fields = (error.fields ?? []).map((field) => `${field.field}: ${field.message}`);
    return [error.message, ...fields].join(" ");
  } catch {
    // Not ours: a proxy's page, say.
  }
  return `The server answered ${answer.status} ${answer.statusText}`.trim();
}
