/** The page's one stream, for every component that wants to know what is new. */

import { createContext } from "preact";
import { useContext, useEffect, useRef, useState } from "preact/hooks";
import { LiveFeed, type LiveListener, type LiveState } from "./api/live";

export const LiveContext = createContext<LiveFeed | null>(null);

/** Makes the feed and tells its state; `follow` is the runs of the current page, null for no stream. */
export function useFeed(follow: string[] | null): { feed: LiveFeed; state: LiveState } {
  const [state, setState] = useState<LiveState>("connecting");
  const feed = useRef<LiveFeed | null>(null);
  feed.current ??= new LiveFeed(setState);
  useEffect(() => {
    if (follow) feed.current?.follow(follow);
    else feed.current?.stop();
  }, [follow?.join() ?? null]);
  return { feed: feed.current, state };
}

/** Calls the newest `listener` on every message while the component is shown. */
export function useLive(listener: LiveListener): void {
  const feed = useContext(LiveContext);
  const newest = useRef(listener);
  newest.current = listener;
  useEffect(
    () =>
      feed?.subscribe({
        update: (update) => newest.current.update?.(update),
        resync: (runs) => newest.current.resync?.(runs),
      }),
    [feed],
  );
}
