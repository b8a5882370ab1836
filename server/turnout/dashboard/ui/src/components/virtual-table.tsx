/** A table of any length: only the rows in sight exist, and are loaded when they come into sight. */

import type { ComponentChildren } from "preact";
import { useRef, useState } from "preact/hooks";

export interface TableColumn<Row> {
  key: string;
  words: string;
  /** What to sort by; left out where the server cannot. */
  sort?: string;
  numeric?: boolean;
  about?: string;
  cell: (row: Row) => ComponentChildren;
}

interface Props<Row> {
  label: string;
  total: number;
  columns: readonly TableColumn<Row>[];
  row: (index: number) => Row | null;
  /** Told which rows are in sight. */
  onSight: (first: number, last: number) => void;
  sort: string;
  order: string;
  onSort: (sort: string, order: string) => void;
}

const ROW = 34;
const SEEN = 14;
const SPARE = 6;

export function VirtualTable<Row>(props: Props<Row>) {
  const { total, columns, sort, order } = props;
  const box = useRef<HTMLDivElement>(null);
  const [top, setTop] = useState(0);
  const first = Math.max(0, Math.min(top - SPARE, total - SEEN));
  const last = Math.min(total, top + SEEN + SPARE);
  const scroll = () => {
    const at = Math.floor((box.current?.scrollTop ?? 0) / ROW);
    setTop(at);
    props.onSight(Math.max(0, at - SPARE), Math.min(total, at + SEEN + SPARE));
  };
  const indices = Array.from({ length: Math.max(0, last - first) }, (_, at) => first + at);
  return (
    <div
      ref={box}
      class="scroll virtual"
      style={{ maxHeight: `${(SEEN + 1) * ROW + 8}px` }}
      tabIndex={0}
      role="region"
      aria-label={props.label}
      onScroll={scroll}
    >
      <table aria-rowcount={total + 1}>
        <thead>
          <tr aria-rowindex={1}>
            {columns.map((column) => (
              <th
                key={column.key}
                scope="col"
                class={column.numeric ? "number" : ""}
                title={column.about}
                aria-sort={column.sort === sort ? (order === "desc" ? "descending" : "ascending") : undefined}
              >
                {column.sort ? (
                  <button type="button" class="sort" onClick={() => props.onSort(column.sort ?? "", turned(column, sort, order))}>
                    {column.words}
                    <span aria-hidden="true">{column.sort === sort ? (order === "desc" ? " ↓" : " ↑") : ""}</span>
                  </button>
                ) : (
                  column.words
                )}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {first > 0 && <Spacer rows={first} columns={columns.length} />}
          {indices.map((index) => (
            <VirtualRow key={index} index={index} row={props.row(index)} columns={columns} />
          ))}
          {last < total && <Spacer rows={total - last} columns={columns.length} />}
        </tbody>
      </table>
    </div>
  );
}

function turned<Row>(column: TableColumn<Row>, sort: string, order: string): string {
  if (column.sort === sort) return order === "desc" ? "asc" : "desc";
  return column.numeric ? "desc" : "asc";
}

function VirtualRow<Row>({ index, row, columns }: { index: number; row: Row | null; columns: readonly TableColumn<Row>[] }) {
  return (
    <tr aria-rowindex={index + 2} style={{ height: `${ROW}px` }}>
      {columns.map((column) => (
        <td key={column.key} class={column.numeric ? "number" : ""}>
          {row ? column.cell(row) : "…"}
        </td>
      ))}
    </tr>
  );
}

function Spacer({ rows, columns }: { rows: number; columns: number }) {
  return (
    <tr aria-hidden="true" style={{ height: `${rows * ROW}px` }}>
      <td colSpan={columns} />
    </tr>
  );
}
