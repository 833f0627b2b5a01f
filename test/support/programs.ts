/** The programs as processes, which end with the test runner even if it is killed. */

import { chmodSync, mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { authorizationServer, client, resourceServer } from "../../config.ts";

export const root = join(import.meta.dir, "../..");

const temporary = mkdtempSync(join(tmpdir(), "oauth-test-"));
chmodSync(temporary, 0o711); // for programs that run as another user
// Removed when this process is gone, even if it is killed, by a shell in the background of one that
// ends: the runner of the tests kills its own children.
const removing = '{ while kill -0 "$1"; do sleep 1; done; rm -rf "$0"; } &';
const options = { stdin: "ignore", stdout: "ignore", stderr: "ignore", detached: true } as const;
Bun.spawn(["sh", "-c", removing, temporary, String(process.pid)], options).unref();

/** A new directory, for as long as the tests run. */
export const temporaryDirectory = () => mkdtempSync(join(temporary, "d-"));

/** What a process needs of the environment of the tests, and no variable of the programs. */
const environment = { PATH: process.env["PATH"], HOME: process.env["HOME"] };

/** A started program, with all that it printed so far. */
export class Program {
  stdout = "";
  stderr = "";
  readonly process: Bun.Subprocess<"ignore", "pipe", "pipe">;
  readonly #read: Promise<unknown>;

  constructor(command: string[], cwd: string, env: Record<string, string | undefined> = {}) {
    this.process = Bun.spawn(command, {
      cwd,
      env: { ...environment, ...env },
      stdin: "ignore",
      stdout: "pipe",
      stderr: "pipe",
    });
    this.#read = Promise.all([this.#collect("stdout"), this.#collect("stderr")]);
  }

  async #collect(stream: "stdout" | "stderr"): Promise<void> {
    const decoder = new TextDecoder();
    for await (const chunk of this.process[stream])
      this[stream] += decoder.decode(chunk, { stream: true });
  }

  /** Waits until it printed what `pattern` matches. Rejects if it ended before. */
  async printed(pattern: RegExp, stream: "stdout" | "stderr" = "stderr"): Promise<void> {
    while (!pattern.test(this[stream])) {
      if (this.process.exitCode !== null || this.process.signalCode !== null) {
        await this.#read;
        if (pattern.test(this[stream])) return;
        throw new Error(`the program ended without ${pattern}: ${this.stderr}${this.stdout}`);
      }
      await Bun.sleep(5);
    }
  }

  /** The exit code, once it ended and everything that it printed was read. */
  async ended(): Promise<number> {
    const code = await this.process.exited;
    await this.#read;
    return code;
  }

  async stop(signal: NodeJS.Signals = "SIGKILL"): Promise<number> {
    this.process.kill(signal);
    return await this.ended();
  }

  /** The lines of the log, parsed. */
  get log(): Record<string, any>[] {
    const lines = this.stdout.split("\n").filter((line) => line.startsWith("{"));
    return lines.map((line) => JSON.parse(line));
  }
}

interface LaunchOptions {
  cwd?: string;
  env?: Record<string, string | undefined>;
  arguments?: string[];
}

const bun = [process.execPath, "run", "--no-orphans"];

/** Starts a program as `bun run` does, in a directory of its own. */
export function launch(
  program: "idp" | "api" | "client" | "config",
  { cwd = temporaryDirectory(), env = {}, arguments: rest = [] }: LaunchOptions = {},
): Program {
  return new Program([...bun, join(root, `${program}.ts`), ...rest], cwd, env);
}

interface Changes {
  authorizationServer?: Partial<typeof authorizationServer>;
  resourceServer?: Partial<typeof resourceServer>;
  client?: Partial<typeof client>;
}

/**
 * Starts one of the servers in a process of its own, with settings that no variable has; it prints
 * its URL as the program does.
 */
export function launchWith(
  program: "idp" | "api",
  changes: Changes,
  { cwd = temporaryDirectory(), env = {} }: LaunchOptions = {},
): Program {
  const party = program === "idp" ? "authorizationServer" : "resourceServer";
  const script = `
    import { ${party}, runProgram } from ${JSON.stringify(join(root, "config.ts"))};
    import { start } from ${JSON.stringify(join(root, `${program}.ts`))};
    const settings = { ...${party}, ...${JSON.stringify(changes[party])} };
    await runProgram("started", () => start(settings));`;
  return new Program([process.execPath, "--no-orphans", "--eval", script], cwd, env);
}

/** The URL that a server printed at its start. */
export async function urlOf(program: Program): Promise<string> {
  await program.printed(/https?:\/\/\S+\n/);
  return /https?:\/\/\S+/.exec(program.stderr)![0];
}
