/** A long list from the server, loaded in pages as they are wanted. */

import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import { ApiError, get } from "./client";

interface Page<Row> {
  items: Row[];
  total: number;
}

const SIZE = 100;

export interface Paged<Row> {
  total: number | null;
  error: ApiError | null;
  row: (index: number) => Row | null;
  want: (first: number, last: number) => void;
  reload: () => void;
}

/** `url(limit, offset)` is the address of a page; `name` changes when another list is meant. */
export function usePages<Row>(name: string, url: (limit: number, offset: number) => string, every: number): Paged<Row> {
  const pages = useRef(new Map<number, Row[]>());
  const asked = useRef(new Set<number>());
  const sight = useRef<[number, number]>([0, 0]);
  const [total, setTotal] = useState<number | null>(null);
  const [error, setError] = useState<ApiError | null>(null);
  const [, redraw] = useState(0);
  const abort = useRef(new AbortController());
  const timer = useRef<number | null>(null);
  const flying = useRef(0);
  const due = useRef(false);

  const load = (page: number): void => {
    const { signal } = abort.current;
    asked.current.add(page);
    flying.current += 1;
    get<Page<Row>>(url(SIZE, page * SIZE), signal).finally(() => landed(signal)).then(
      (answer) => {
        pages.current.set(page, answer.items);
        setTotal(answer.total);
        setError(null);
        redraw((now) => now + 1);
      },
      (problem: unknown) => {
        asked.current.delete(page);
        if (!signal.aborted && problem instanceof ApiError) setError(problem);
      },
    );
  };
  /** A reload that was asked for meanwhile comes after the last page under way. */
  const landed = (signal: AbortSignal): void => {
    if (signal.aborted) return;
    flying.current -= 1;
    if (flying.current > 0 || !due.current) return;
    due.current = false;
    reload();
  };
  const want = (first: number, last: number): void => {
    sight.current = [first, last];
    for (let page = Math.floor(first / SIZE); page * SIZE <= last; page += 1) if (!asked.current.has(page)) load(page);
  };
  /** Loads what is in sight again; the rest when it comes into sight. The old rows stay on show meanwhile. */
  const again = (): void => {
    asked.current.clear();
    want(...sight.current);
  };
  const reload = useCallback(() => {
    if (flying.current > 0) {
      due.current = true;
      return;
    }
    timer.current ??= window.setTimeout(() => {
      timer.current = null;
      newest.current();
    }, every);
  }, [every]);
  const newest = useRef(again);
  newest.current = again;

  useEffect(() => {
    abort.current = new AbortController();
    flying.current = 0;
    pages.current.clear();
    sight.current = [0, 0];
    newest.current();
    return () => abort.current.abort();
  }, [name]);
  useEffect(() => () => clearTimeout(timer.current ?? undefined), []);

  const row = (index: number): Row | null => pages.current.get(Math.floor(index / SIZE))?.[index % SIZE] ?? null;
  return { total, error, row, want, reload };
}
