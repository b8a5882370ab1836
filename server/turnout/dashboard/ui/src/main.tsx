import { render } from "preact";
import { App } from "./app";
import { followTheme } from "./lib/palette";

followTheme();
const root = document.getElementById("app");
if (root) render(<App />, root);
