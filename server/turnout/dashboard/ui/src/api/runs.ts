import { useEffect, useState } from "preact/hooks";
import { useLive } from "../live";
import { api, ApiError, get, type RunDetail } from "./client";

/** Several runs in full, in the order asked for; rounds that are committed meanwhile are counted. */
export function useRuns(ids: readonly string[]): { data: RunDetail[] | null; error: ApiError | null } {
  const [state, setState] = useState<{ key: string; data: RunDetail[] | null; error: ApiError | null }>({
    key: "",
    data: null,
    error: null,
  });
  const key = ids.join();
  useEffect(() => {
    const abort = new AbortController();
    Promise.all(ids.map((id) => get<RunDetail>(api(`runs/${encodeURIComponent(id)}`), abort.signal))).then(
      (data) => setState({ key, data, error: null }),
      (error: unknown) => {
        if (!abort.signal.aborted && error instanceof ApiError) setState({ key, data: null, error });
      },
    );
    return () => abort.abort();
  }, [key]);
  useLive({
    update: ({ runs }) =>
      setState((old) => {
        const fresh = new Map(runs.map((run) => [run.id, run]));
        if (!old.data?.some((run) => fresh.has(run.id))) return old;
        return { ...old, data: old.data.map((run) => ({ ...run, ...fresh.get(run.id) })) };
      }),
  });
  return state.key === key ? state : { data: null, error: null };
}
