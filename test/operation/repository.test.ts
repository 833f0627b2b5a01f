/** What the repository promises of itself: its files, its size, what they import, export and keep. */

import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { root } from "../support/programs.ts";

const files = ["config.ts", "idp.ts", "api.ts", "client.ts"];
const read = (file: string) => readFileSync(join(root, file), "utf8");
const inTests = readdirSync(join(root, "test"), { recursive: true, encoding: "utf8" });
const tests = inTests.filter((name) => name.endsWith(".ts"));

// --- Reading TypeScript --------------------------------------------------------------------------

/** Whether a line of formatted code is comment and nothing else. */
const isComment = (line: string) => /^\s*(\/\/|\/\*|\*)/.test(line);
const countLines = (text: string) => text.split("\n").filter((line) => line.trim() !== "").length;
const sum = (numbers: number[]) => numbers.reduce((total, number) => total + number, 0);

/** Every function, method and arrow function with a body in braces, with its length in lines. */
function functions(code: string): { name: string; lines: number }[] {
  const lines = code.split("\n");
  const indentAt = (index: number) => /^ */.exec(lines[index] ?? "")![0];
  return lines.flatMap((line, index) => {
    const isOpened = /(=>|\)(: .+)?) \{$/.test(line);
    if (!isOpened || /^ *(\} )?(else |if|for|while|switch|catch)\b/.test(line)) return [];
    // The formatter puts the end at the indentation of the start, also of parameters in lines.
    const isEnd = (other: string) => other.startsWith(`${indentAt(index)}}`);
    const isStart = (other: string) => other.startsWith(indentAt(index)) && !/^ *\)/.test(other);
    const end = lines.findIndex((other, at) => at > index && isEnd(other));
    const start = lines.findLastIndex(
      (other, at) => at <= index && isStart(other) && indentAt(at) === indentAt(index),
    );
    return [{ name: lines[start]!.trim(), lines: end - start + 1 }];
  });
}

const sources = files.map((file) => {
  const text = read(file);
  const code = text.split("\n").filter((line) => !isComment(line));
  return { file, text, code: code.join("\n") };
});
const codeLines = sum(sources.map(({ code }) => countLines(code)));

// --- Size and shape ------------------------------------------------------------------------------

describe("size", () => {
  test("at most 1,600 lines of code in the four files together", () =>
    expect(codeLines).toBeLessThanOrEqual(1_600));

  test("between a fifth and a third of the lines that are not blank are comments", () => {
    const all = sum(sources.map(({ text }) => countLines(text)));
    const share = (all - codeLines) / all;
    expect(share).toBeGreaterThanOrEqual(1 / 5);
    expect(share).toBeLessThanOrEqual(1 / 3);
  });

  test.each(sources)("$file: no function over 30 lines", ({ text }) => {
    const all = functions(text);
    expect(all.length).toBeGreaterThan(20);
    expect(all.filter(({ lines }) => lines > 30)).toEqual([]);
  });

  test.each(sources)("$file: at most 100 columns, and eight sections of one form", ({ text }) => {
    const lines = text.split("\n");
    expect(lines.filter((line) => [...line].length > 100)).toEqual([]);
    const banners = lines.filter((line) => /^\/\/ -/.test(line));
    expect(banners.length).toBeLessThanOrEqual(8);
    for (const banner of banners) expect(banner).toMatch(/^\/\/ --- [A-Z].+ -{3,}$/);
  });

  const linesIn = (names: string[]) =>
    sum(names.map((name) => read(`test/${name}`).split("\n").length - 1));

  test("at most 8,000 lines of tests, at most 3,500 of them for conformance", () => {
    expect(linesIn([...tests, "README.md"])).toBeLessThanOrEqual(8_000);
    const conformance = tests.filter((name) => name.startsWith("conformance/"));
    expect(conformance.length).toBeGreaterThan(5);
    expect(linesIn(conformance)).toBeLessThanOrEqual(3_500);
  });

  test("test/README.md names every file of the tests, and no other", () => {
    const names = tests.map((name) => name.replace(/^.*\//, ""));
    const found = read("test/README.md").matchAll(/`(?:[a-z]+\/)?([a-z]+(?:\.test)?\.ts)`/g);
    const named = new Set([...found].map(([, name]) => name!));
    expect(new Set(names).difference(named)).toEqual(new Set());
    expect(named.difference(new Set([...names, ...files]))).toEqual(new Set());
  });
});

// --- What stands where ---------------------------------------------------------------------------

describe("files", () => {
  const atTop = [
    ...["package.json", "bunfig.toml", "tsconfig.json", "bun.lock", "README.md", "LICENSE"],
    ...[...files, ".gitignore", ".ci", "test"],
  ];

  test("nothing else at the top level, but for what git ignores", () => {
    const patterns = read(".gitignore").trim().split("\n");
    const ignored = patterns.map((line) => new Bun.Glob(line.replace(/\/$/, "")));
    const found = readdirSync(root).filter((name) => !ignored.some((glob) => glob.match(name)));
    expect(found.filter((name) => name !== ".git").toSorted()).toEqual(atTop.toSorted());
    for (const kept of ["keys/", "node_modules/", ".env"]) expect(patterns).toContain(kept);
  });

  test("jose and bun-types are the only packages, in exact versions, from no named registry", () => {
    const { dependencies, devDependencies } = JSON.parse(read("package.json"));
    expect(Object.keys(dependencies)).toEqual(["jose"]);
    expect(Object.keys(devDependencies)).toEqual(["bun-types"]);
    for (const version of Object.values({ ...dependencies, ...devDependencies }))
      expect(version).toMatch(/^\d+\.\d+\.\d+$/);
    expect(read("bun.lock")).toMatch(/"jose@[^\n]*"sha512-/);
    expect(read("bun.lock")).not.toMatch(/https?:|\/\/|registry/);
  });

  test("no private key, token or secret is kept", () => {
    const names = atTop.filter((name) => !["test", ".ci"].includes(name));
    names.push(".ci/run", ...tests.map((name) => `test/${name}`));
    const secrets =
      /KEY-----\s*[A-Za-z0-9+/]{20}|"?\bd"?: "[\w-]{20,}"|eyJ[\w-]{20,}\.eyJ[\w-]{20,}/;
    expect(names.filter((name) => secrets.test(read(name)))).toEqual([]);
  });

  test("every file that a script or .ci/run names is there", () => {
    const { scripts } = JSON.parse(read("package.json")) as { scripts: Record<string, string> };
    const text = `${Object.values(scripts).join("\n")}\n${read(".ci/run")}`;
    const named = [...text.matchAll(/[\w./-]+\.ts\b/g)].map(([name]) => name);
    for (const name of named) expect(Bun.file(join(root, name)).size).toBeGreaterThan(0);
    // What `bun run` calls by name, one or several after `--parallel`.
    const runs = [...text.matchAll(/\bbun run ([^\n&]+)/g)].flatMap(([, words]) =>
      words!.split(" "),
    );
    const called = runs.filter((word) => /^[\w:]+$/.test(word));
    expect(called).toContain("client:wait");
    expect(called.filter((name) => !(name in scripts))).toEqual([]);
  });
});

describe("modules", () => {
  const matches = (text: string, pattern: RegExp) =>
    [...text.matchAll(pattern)].map(([, found]) => found!);

  test.each(sources)("$file imports jose, built-ins and ./config.ts alone", (source) => {
    const own = source.file === "config.ts" ? [] : ["./config.ts"];
    const imported = matches(source.code, /\b(?:from|import)\s*\(?"([^"]+)"/g);
    const others = imported.filter((name) => !/^(jose|bun|node:.+)$/.test(name));
    expect([...new Set(others)]).toEqual(own);
    expect(source.code).not.toMatch(/Bun\.serve\([^)]*\broutes:/); // routing is by hand
  });

  test("no state in modules: the one let is the standard output of a process", () => {
    const variables = sources.flatMap(({ file, code }) =>
      matches(code, /^(?:export )?(?:let|var) (\w+)/gm).map((name) => `${file} ${name}`),
    );
    expect(variables).toEqual(["config.ts standardOutput"]);
  });

  test("the environment is read in config.ts alone", () => {
    for (const { file, code } of sources)
      expect([file, /\benv\b/.test(code)]).toEqual([file, file === "config.ts"]);
  });

  // A type or an error may also be what another export of its file takes, gives or throws.
  test("no export is for tests alone: another of the four files uses it, or README.md names it", () => {
    for (const { file, code } of sources) {
      const others = sources.filter((source) => source.file !== file).map((source) => source.code);
      const words = [...others, read("README.md")].join("\n");
      const count = (name: string, text: string) =>
        matches(text, RegExp(`\\b(${name})\\b`, "g")).length;
      const values = matches(code, /^export (?:async )?(?:const|let|function) (\w+)/gm);
      const shapes = matches(code, /^export (?:class|interface|type) (\w+)/gm);
      expect(values.length + shapes.length).toBeGreaterThan(0);
      const unused = [...values, ...shapes].filter((name) => count(name, words) === 0);
      const isUsedHere = (name: string) => shapes.includes(name) && count(name, code) > 1;
      expect([file, ...unused.filter((name) => !isUsedHere(name))]).toEqual([file]);
    }
  });
});
