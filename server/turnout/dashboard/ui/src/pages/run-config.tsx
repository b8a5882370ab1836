/** What the run was told, and what another one was told differently. */

import { useMemo } from "preact/hooks";
import type { ConfigDiff, RunList } from "../api/client";
import { api } from "../api/client";
import { useLoad } from "../api/load";
import { DiffTable } from "../components/diff-table";
import { Pending, Section, Select } from "../components/parts";
import { plain, plural } from "../lib/format";
import { flattened, shown } from "../lib/tree";
import { set } from "../router";
import type { TabProps } from "./run";

export function RunConfig({ run, query }: TabProps) {
  const against = query.get("against") ?? "";
  const others = useLoad<RunList>(api("runs", { limit: 200 }));
  const diff = useLoad<ConfigDiff>(against ? api("diff", { left: run.id, right: against }) : null);
  const choices = (others.data?.items ?? []).filter((other) => other.id !== run.id);
  const picker = (
    <Select
      label="Compare with"
      value={against}
      options={[["", "no other run"], ...choices.map((other) => [other.id, `${other.id} ${other.name} ${other.strategy}`] as const)]}
      onChange={(value) => set({ against: value })}
    />
  );
  return (
    <>
      <Section id="experiment" title={against ? "Differences" : "Experiment"} tools={picker}>
        {!against && <Tree tree={run.config} />}
        {against && !diff.data && <Pending error={diff.error} retry={diff.reload} />}
        {against && diff.data && (
          <>
            <p class="note">{plural(diff.data.same, "key")} are the same in both.</p>
            <DiffTable
              columns={[run.id, against]}
              rows={diff.data.differences.map((one) => ({
                path: one.path,
                values: [one.has_left ? shown(one.left) : null, one.has_right ? shown(one.right) : null],
              }))}
            />
          </>
        )}
      </Section>
      <Section id="environment" title="Environment">
        {run.environment ? (
          <Tree tree={run.environment} />
        ) : (
          <p class="empty">The run's directory is not on this machine, so what it ran on is not known here.</p>
        )}
      </Section>
      <Section id="identity" title="Result">
        <Tree tree={{ directory: run.directory, "model-sha256": run.model_sha256 ?? "not finished" }} />
      </Section>
    </>
  );
}

function Tree({ tree }: { tree: Record<string, unknown> }) {
  const leaves = useMemo(() => flattened(tree), [tree]);
  return (
    <dl class="tree">
      {leaves.map(([path, value]) => (
        <div key={path}>
          <dt>
            <bdi>{plain(path)}</bdi>
          </dt>
          <dd>
            <bdi>{shown(value)}</bdi>
          </dd>
        </div>
      ))}
    </dl>
  );
}
