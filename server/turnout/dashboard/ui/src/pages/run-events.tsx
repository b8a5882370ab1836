/** What happened, newest last; new events come by themselves. */

import { useEffect, useState } from "preact/hooks";
import type { EventItem, EventPage } from "../api/client";
import { api, get } from "../api/client";
import { useLoad } from "../api/load";
import { Pending, Section, When } from "../components/parts";
import { count, plain, plural } from "../lib/format";
import { useLive } from "../live";
import { set } from "../router";
import type { TabProps } from "./run";

const PAGE = 200;

export function RunEvents({ run, query }: TabProps) {
  const first = useLoad<EventPage>(api(`runs/${run.id}/events`, { limit: PAGE }), 1_000);
  const [events, setEvents] = useState<EventItem[]>([]);
  const [more, setMore] = useState(false);
  const add = (items: readonly EventItem[]) =>
    setEvents((old) => {
      const last = old.at(-1)?.id ?? 0;
      return [...old, ...items.filter((item) => item.run === run.id && item.id > last)];
    });
  useEffect(() => {
    if (!first.data) return;
    setEvents(first.data.items);
    setMore(first.data.more);
  }, [first.data]);
  useLive({ update: ({ events: fresh }) => !more && add(fresh), resync: first.reload });
  const next = async () => {
    const page = await get<EventPage>(api(`runs/${run.id}/events`, { after: events.at(-1)?.id ?? 0, limit: PAGE }));
    add(page.items);
    setMore(page.more);
  };
  const word = (query.get("q") ?? "").toLowerCase();
  const shown = events.filter((event) => `${event.kind} ${event.message} ${event.round ?? ""}`.toLowerCase().includes(word));
  const search = (
    <label class="search">
      <span class="hidden">Search events</span>
      <input type="search" placeholder="Search events" value={query.get("q") ?? ""} onInput={(event) => set({ q: event.currentTarget.value })} />
    </label>
  );
  return (
    <Section id="events" title="Events" tools={search}>
      {!first.data && <Pending error={first.error} retry={first.reload} />}
      {first.data && shown.length === 0 && <p class="empty">No event{word && " matches"}.</p>}
      {shown.length > 0 && (
        <div class="scroll tall" tabIndex={0} role="log" aria-label="Events">
          <table>
            <thead>
              <tr>
                <th scope="col">Time</th>
                <th scope="col">Kind</th>
                <th scope="col" class="number">
                  Round
                </th>
                <th scope="col">What</th>
              </tr>
            </thead>
            <tbody>
              {shown.map((event) => (
                <tr key={event.id}>
                  <td>
                    <When at={event.created_at} />
                  </td>
                  <td>{plain(event.kind)}</td>
                  <td class="number">{event.round == null ? "" : count(event.round)}</td>
                  <td class="wrap">
                    <bdi>{plain(event.message)}</bdi>
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
      {more && (
        <button type="button" onClick={() => void next()}>
          Load more than {plural(events.length, "event")}
        </button>
      )}
    </Section>
  );
}
