/** Loading a document for a component: the old one stays on show while the new one is on its way. */

import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import { ApiError, get } from "./client";

export interface Loaded<T> {
  data: T | null;
  error: ApiError | null;
  loading: boolean;
  reload: () => void;
}

/**
 * Loads `url` (nothing when null) and again on `reload`, at most every `every` milliseconds. A reload waits for a
 * load under way: on a slow server one that were cut off by the next would never end.
 */
export function useLoad<T>(url: string | null, every = 0): Loaded<T> {
  const [state, setState] = useState<{ url: string | null; data: T | null; error: ApiError | null }>({
    url: null,
    data: null,
    error: null,
  });
  const [loading, setLoading] = useState(false);
  const [turn, setTurn] = useState(0);
  const waiting = useRef<number | null>(null);
  const last = useRef(0);
  const busy = useRef(false);
  const again = useRef(false);

  const newest = useRef(() => {});

  useEffect(() => {
    if (url == null) return;
    const abort = new AbortController();
    last.current = performance.now();
    setLoading(true);
    busy.current = true;
    again.current = false;
    get<T>(url, abort.signal)
      .then((data) => setState({ url, data, error: null }))
      .catch((error: unknown) => {
        if (abort.signal.aborted) return;
        const told = error instanceof ApiError ? error : new ApiError(-1, String(error));
        setState((old) => ({ url, data: old.data, error: told }));
      })
      .finally(() => {
        if (abort.signal.aborted) return;
        setLoading(false);
        busy.current = false;
        if (again.current) newest.current();
      });
    return () => abort.abort();
  }, [url, turn]);

  useEffect(() => () => clearTimeout(waiting.current ?? undefined), []);

  const reload = useCallback(() => {
    if (busy.current) again.current = true;
    if (busy.current || waiting.current != null) return;
    const rest = Math.max(0, every - (performance.now() - last.current));
    waiting.current = window.setTimeout(() => {
      waiting.current = null;
      setTurn((now) => now + 1);
    }, rest);
  }, [every]);

  newest.current = reload;
  return { data: state.data, error: state.error, loading, reload };
}
