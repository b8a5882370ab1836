import { plain } from "../lib/format";

interface Props {
  columns: readonly string[];
  /** One value per column; null where a run does not have the key. */
  rows: readonly { path: string; values: readonly (string | null)[] }[];
}

/** Settings that differ, one row each. */
export function DiffTable({ columns, rows }: Props) {
  if (rows.length === 0) return <p class="empty">No setting differs.</p>;
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label="Table of the settings that differ">
      <table class="diff">
        <thead>
          <tr>
            <th scope="col">Setting</th>
            {columns.map((name) => (
              <th key={name} scope="col">
                <bdi>{plain(name)}</bdi>
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map(({ path, values }) => (
            <tr key={path}>
              <th scope="row">
                <bdi>{plain(path)}</bdi>
              </th>
              {values.map((value, index) => (
                <td key={columns[index]}>{value == null ? <span class="note">not set</span> : <bdi>{value}</bdi>}</td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}
