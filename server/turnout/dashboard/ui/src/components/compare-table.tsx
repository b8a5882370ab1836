import type { Comparison } from "../api/client";
import { bytes, count, metric, number, plain, seconds, UNKNOWN } from "../lib/format";
import { seriesStyle, useTheme } from "../lib/palette";
import { address } from "../router";
import { Name, Status } from "./parts";

type Row = Comparison["table"][number];

interface Column {
  words: string;
  /** Which end is the better one; left out where neither is. */
  better?: "high" | "low";
  value: (row: Row) => number | null;
  write: (row: Row) => string;
  /** Left out of the table where no run has it. */
  optional?: boolean;
}

interface Props {
  data: Comparison;
  labels: ReadonlyMap<string, string>;
}

function columnsOf(data: Comparison): Column[] {
  const better = data.higher_is_better ? "high" : "low";
  const say = (value: number | null, round: number | null) =>
    value == null ? UNKNOWN : `${metric(data.name, value)} (round ${count(round)})`;
  const moved = (row: Row) =>
    row.sent_bytes == null && row.received_bytes == null ? null : (row.sent_bytes ?? 0) + (row.received_bytes ?? 0);
  const target: Column[] = [
    { words: "Rounds to target", better: "low", value: (row) => row.rounds_to_target, write: (row) => reached(count(row.rounds_to_target)) },
    { words: "Seconds to target", better: "low", value: (row) => row.seconds_to_target, write: (row) => reached(seconds(row.seconds_to_target)) },
    { words: "Bytes to target", better: "low", optional: true, value: (row) => row.bytes_to_target, write: (row) => reached(bytes(row.bytes_to_target)) },
  ];
  return [
    { words: "Best", better, value: (row) => row.best, write: (row) => say(row.best, row.best_round) },
    { words: "Final", better, value: (row) => row.last, write: (row) => say(row.last, row.last_round) },
    ...(data.target == null ? [] : target),
    { words: "Clients a round", value: (row) => row.participants_mean, write: (row) => number(row.participants_mean) },
    { words: "Model bytes", better: "low", optional: true, value: moved, write: (row) => bytes(moved(row)) },
    { words: "Time in rounds", better: "low", value: (row) => row.seconds, write: (row) => seconds(row.seconds) },
  ];
}

function reached(text: string): string {
  return text === UNKNOWN ? "not reached" : text;
}

/** How every run ended; the best cell of a column says so, by a star as well as by its weight. */
export function CompareTable({ data, labels }: Props) {
  const { colours } = useTheme();
  const columns = columnsOf(data).filter((column) => !column.optional || data.table.some((row) => column.value(row) != null));
  const winners = columns.map((column) => best(column, data.table));
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label="How the runs ended, table">
      <table class="compare">
        <thead>
          <tr>
            <th scope="col">Run</th>
            <th scope="col">Status</th>
            {columns.map((column) => (
              <th key={column.words} scope="col" class="number">
                {column.words}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {data.table.map((row, index) => (
            <tr key={row.run.id}>
              <th scope="row">
                <span class="key" style={{ background: seriesStyle(colours, index).colour }} aria-hidden="true" />
                <a href={address({ page: "run", run: row.run.id })}>
                  <Name text={labels.get(row.run.id) ?? row.run.id} />
                </a>
              </th>
              <td>
                <Status status={row.run.status} />
              </td>
              {columns.map((column, at) => {
                const wins = winners[at] != null && column.value(row) === winners[at];
                return (
                  <td key={column.words} class={wins ? "number best" : "number"}>
                    {wins && (
                      <span title="the best of the column">
                        <span aria-hidden="true">★ </span>
                        <span class="hidden">best: </span>
                      </span>
                    )}
                    {plain(column.write(row))}
                  </td>
                );
              })}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

/** The winning value of a column; none where there is nothing to choose. */
function best(column: Column, rows: readonly Row[]): number | null {
  const values = rows.map(column.value).filter((value): value is number => value != null);
  if (!column.better || values.length < 2) return null;
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return low === high ? null : column.better === "high" ? high : low;
}
