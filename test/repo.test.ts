/** The promises of the project about itself: sizes, layout, imports, what the README says. */

import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { root } from "./support.ts";

const files = ["config.ts", "idp.ts", "api.ts", "client.ts"] as const;
const read = (file: string) => readFileSync(join(root, file), "utf8");
const sources = Object.fromEntries(files.map((file) => [file, read(file)]));
const readme = read("README.md");

const isCode = (line: string) => !/^\s*($|\/\/|\/?\*)/.test(line);
const codeLines = (file: string) => sources[file]!.split("\n").filter(isCode).length;

describe("size", () => {
  const budgets = { "config.ts": 150, "idp.ts": 430, "api.ts": 220, "client.ts": 150 };

  test.each(Object.entries(budgets))("%s has at most %d lines of code", (file, budget) => {
    expect(codeLines(file)).toBeLessThanOrEqual(budget);
  });

  test("under 1,000 lines of code in all, at most 1,300 with comments", () => {
    const code = files.map(codeLines).reduce((sum, lines) => sum + lines);
    const all = files.map((file) => sources[file]!.split("\n").length - 1);
    expect(code).toBeLessThan(1_000);
    expect(all.reduce((sum, lines) => sum + lines)).toBeLessThanOrEqual(1_300);
  });

  test.each(files)("%s has no function over 30 lines and no line over 100 columns", (file) => {
    const lines = sources[file]!.split("\n");
    const long = lines.flatMap((line, start) => {
      if (!/^(export )?(default )?(async )?function /.test(line)) return [];
      const end = lines.findIndex((other, at) => at > start && other === "}");
      return end - start + 1 > 30 ? [`${line} (${end - start + 1})`] : [];
    });
    expect(long).toEqual([]);
    expect(lines.filter((line) => [...line].length > 100)).toEqual([]);
  });

  test.each(files)("%s has at most eight sections with banners of one form", (file) => {
    const banners = sources[file]!.split("\n").filter((line) => /^\/\/ -/.test(line));
    expect(banners.length).toBeLessThanOrEqual(8);
    for (const banner of banners) expect(banner).toMatch(/^\/\/ --- [A-Z][A-Za-z ,]+ -+$/);
    for (const banner of banners) expect(banner.length).toBe(100);
  });
});

describe("layout", () => {
  test("nothing else at the top level, but for what git ignores", () => {
    const known = [
      ...files,
      ...["package.json", "bunfig.toml", "tsconfig.json", "bun.lock", "README.md", "LICENSE"],
      ...[".gitignore", ".ci", "test", ".git"],
    ];
    const patterns = read(".gitignore").trim().split("\n");
    const ignored = patterns.map((line) => new Bun.Glob(line.replace(/\/$/, "")));
    const others = readdirSync(root).filter((name) => !known.includes(name));
    expect(others.filter((name) => !ignored.some((glob) => glob.match(name)))).toEqual([]);
  });

  test("jose and bun-types are the only packages", () => {
    const { dependencies, devDependencies } = JSON.parse(read("package.json"));
    expect(Object.keys(dependencies)).toEqual(["jose"]);
    expect(Object.keys(devDependencies)).toEqual(["bun-types"]);
    expect(read("bun.lock")).not.toContain("http");
  });

  test.each(["idp.ts", "api.ts", "client.ts"])(
    "%s imports jose, built-ins, ./config.ts",
    (file) => {
      const imported = [...sources[file]!.matchAll(/from "([^"]+)"/g)].map(([, name]) => name!);
      const foreign = imported.filter((name) => !/^(jose|\.\/config\.ts|node:.+|bun)$/.test(name));
      expect(foreign).toEqual([]);
    },
  );

  test("each program takes its own object from config.ts", () => {
    const parties = ["authorizationServer", "resourceServer", "client"];
    const taken = (file: string) => {
      const imports = [...sources[file]!.matchAll(/import \{([^}]+)\} from "\.\/config\.ts"/g)];
      const names = imports.flatMap(([, list]) => list!.split(",").map((name) => name.trim()));
      return parties.filter((party) => names.includes(party));
    };
    expect(taken("idp.ts")).toEqual(["authorizationServer"]);
    expect(taken("api.ts")).toEqual(["resourceServer"]);
    expect(taken("client.ts")).toEqual(["client"]);
  });

  test("no router, no routes option", () => {
    for (const file of files) expect(sources[file]!).not.toMatch(/\broutes\s*:/);
  });
});

describe("README", () => {
  test("at most 200 lines", () => {
    expect(readme.split("\n").length - 1).toBeLessThanOrEqual(200);
  });

  test.each(files)("the lines of code of %s", (file) => {
    const row = readme.split("\n").find((line) => line.startsWith(`| \`${file}\``));
    expect(row).toMatch(new RegExp(`\\| ${codeLines(file)} +\\|$`));
  });

  test("every script that it runs is there", () => {
    const { scripts } = JSON.parse(read("package.json"));
    const named = [...readme.matchAll(/`bun run ([a-z:]+)`/g)].map(([, script]) => script!);
    expect(named.length).toBeGreaterThan(2);
    for (const script of named) expect(Object.keys(scripts)).toContain(script);
    expect(Object.keys(scripts)).toContain("start");
  });

  test("every path that it names is served", () => {
    const paths = [...readme.matchAll(/`(\/[a-z.\-/]+)`/g)].map(([, path]) => path!);
    const served = `${sources["idp.ts"]}${sources["api.ts"]}`;
    for (const path of paths.filter((name) => !name.startsWith("/etc"))) {
      expect(served).toContain(`"${path}"`);
    }
  });

  test("every environment variable that is read is in the table, and no other", () => {
    const code = files.map((file) => sources[file]).join("\n");
    const used = [...code.matchAll(/env\["([A-Z_]+)"\]|fileText\("([A-Z_]+)"\)/g)];
    const names = new Set(used.map(([, name, other]) => name ?? other!));
    for (const listen of ["ISSUER_LISTEN", "API_LISTEN"]) names.add(listen);
    const rows = readme.split("\n").filter((line) => /^\| `[A-Z]/.test(line));
    const told = rows.flatMap((row) => [...row.split("|")[1]!.matchAll(/`([A-Z_]+)`/g)]);
    const variables = told.map(([, name]) => name!).filter((name) => /^[A-Z_]+$/.test(name));
    expect(new Set(variables)).toEqual(names);
  });

  test("every RFC section that the code cites is in the conformance table", () => {
    const rows = readme.slice(readme.indexOf("## Conformance")).matchAll(/^\| (\d[^|]+?) *\|/gm);
    const told = new Set([...rows].flatMap(([, cell]) => cell!.split(", ")));
    const citation = /RFC (\d+) (§[\d.]*\d|Appendix [A-Z])(?: and (§[\d.]*\d))?/g;
    const cited = files.flatMap((file) => [...sources[file]!.matchAll(citation)]);
    expect(cited.length).toBeGreaterThan(20);
    const all = cited.flatMap(([, rfc, ...parts]) => parts.map((part) => part && `${rfc} ${part}`));
    expect([...new Set(all)].filter((one) => one && !told.has(one))).toEqual([]);
  });

  test("every name in the Code column of the conformance table is there", () => {
    const table = readme.slice(readme.indexOf("## Conformance"), readme.indexOf("## Choices"));
    const names = [...table.matchAll(/^\| \d[^|]+\|[^|]+\|([^|]+)\|/gm)].flatMap(([, cell]) => [
      ...cell!.matchAll(/`(\w+)`/g),
    ]);
    expect(names.length).toBeGreaterThan(20);
    const code = files.map((file) => sources[file]).join("\n");
    for (const [, name] of names)
      expect(code).toMatch(new RegExp(`\\b(function|const|interface) ${name}\\b`));
  });

  test("every test file that the conformance table names is there", () => {
    const table = readme.slice(readme.indexOf("## Conformance"));
    const named = [...table.matchAll(/`([a-z]+)\.test`/g)].map(([, name]) => `${name}.test.ts`);
    expect(named.length).toBeGreaterThan(10);
    for (const name of named) expect(readdirSync(join(root, "test"))).toContain(name);
  });
});
