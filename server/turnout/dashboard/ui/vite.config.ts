import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";
import { defineConfig, type Plugin } from "vite";

const SHIPPED = ["preact", "uplot"];

/** Ships the licences of what is bundled beside the bundle. */
function licences(): Plugin {
  return {
    name: "third-party-licences",
    generateBundle() {
      const texts = SHIPPED.map((name) => {
        const folder = new URL(`./node_modules/${name}/`, import.meta.url);
        const { version } = JSON.parse(readFileSync(new URL("package.json", folder), "utf8")) as { version: string };
        return `${name} ${version}\n\n${readFileSync(new URL("LICENSE", folder), "utf8").trim()}\n`;
      });
      this.emitFile({
        type: "asset",
        fileName: "THIRD_PARTY_LICENSES.txt",
        source: texts.join(`\n${"-".repeat(80)}\n\n`),
      });
    },
  };
}

/** Compresses once what the server would otherwise compress at every load. */
function compressed(): Plugin {
  return {
    name: "compressed-copies",
    enforce: "post",
    generateBundle(_, bundle) {
      for (const file of Object.values(bundle)) {
        const source = file.type === "chunk" ? file.code : file.source;
        if (!/\.(js|css)$/.test(file.fileName)) continue;
        this.emitFile({ type: "asset", fileName: `${file.fileName}.gz`, source: gzipSync(source, { level: 9 }) });
      }
    },
  };
}

export default defineConfig({
  // Relative addresses: the page also works under a prefix of a reverse proxy.
  base: "./",
  plugins: [licences(), compressed()],
  build: {
    outDir: fileURLToPath(new URL("../static", import.meta.url)),
    emptyOutDir: true,
    target: "es2022",
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    reportCompressedSize: false,
  },
  // `npx vite`: work on the page beside a running `turnout dashboard`.
  server: { host: "127.0.0.1", proxy: { "/api": process.env["TURNOUT_DASHBOARD"] ?? "http://127.0.0.1:8050" } },
});
