/** Both servers behind a real nginx, which ends TLS and keeps the path: the addresses are public. */

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { existsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { authorizationServer } from "../../config.ts";
import { eventually, freePort } from "../support/databases.ts";
import { challenges, post, send } from "../support/http.ts";
import { key, proof } from "../support/jwt.ts";
import { Program, temporaryDirectory } from "../support/programs.ts";
import { api, idp, tokenSource } from "../support/servers.ts";

const nginx = Bun.which("nginx") ?? "/usr/sbin/nginx";
const missing = [nginx, Bun.which("openssl") ?? "openssl"].filter((file) => !existsSync(file));
const why = missing.length > 0 ? ` (skipped: ${missing.join(" and ")} not found)` : "";

describe.skipIf(missing.length > 0)(`behind nginx${why}`, () => {
  const directory = temporaryDirectory();
  const certificateFile = join(directory, "cert.pem");
  const tls = { certificateFile, keyFile: certificateFile, developmentFile: "" };
  const origin = `https://localhost:${freePort()}`;
  const [issuer, resource] = [`${origin}/auth`, `${origin}/v1`];
  const behind = { tls, listen: "127.0.0.1:0", drainSeconds: 0.2 };
  const scopes = [{ scope: "api1", description: "My API", resource }];
  const right = { grant_type: "client_credentials", client_id: "client", client_secret: "secret" };
  const trusting = { tls: { rejectUnauthorized: false } };
  let idps: Awaited<ReturnType<typeof idp>>[];
  let protectedApi: Awaited<ReturnType<typeof api>>;
  let proxy: Program;

  beforeAll(async () => {
    const databaseUrl = `sqlite://${join(directory, "keys.db")}`;
    const settings = { ...behind, issuer, scopes, databaseUrl };
    idps = [await idp(settings), await idp(settings)];
    protectedApi = await api(issuer, { ...behind, resource });
    const names = ["-addext", "subjectAltName=DNS:localhost", "-subj", "/CN=localhost"];
    const files = ["-keyout", certificateFile, "-out", certificateFile];
    const curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"];
    Bun.spawnSync(["openssl", "req", "-x509", "-nodes", ...curve, ...names, ...files]);
    const at = ({ server }: { server: Bun.Server<undefined> }) =>
      `server 127.0.0.1:${server.port};`;
    const file = join(directory, "nginx.conf");
    // As the README has it, but for the directories of a user without rights.
    const temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
    writeFileSync(
      file,
      `daemon off; master_process off; pid ${directory}/pid; error_log stderr crit;
      events {}
      http {
        access_log off;
        ${temporary.map((name) => `${name}_temp_path ${directory}/${name};`).join(" ")}
        upstream idp { ${idps.map(at).join(" ")} keepalive 8; }
        upstream api { ${at(protectedApi)} keepalive 8; }
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        server {
          listen 127.0.0.1:${new URL(origin).port} ssl;
          ssl_certificate ${certificateFile};
          ssl_certificate_key ${certificateFile};
          location /auth/ { proxy_pass http://idp; }
          location = /.well-known/oauth-authorization-server/auth { proxy_pass http://idp; }
          location /v1/ { proxy_pass http://api; }
          location = /.well-known/oauth-protected-resource/v1 { proxy_pass http://api; }
        }
      }`,
    );
    proxy = new Program([nginx, "-c", file, "-p", directory, "-e", "stderr"], directory);
    await eventually("nginx answers", async () => {
      if (proxy.process.exitCode !== null) throw new Error(proxy.stderr);
      return await send(`${issuer}/health`, trusting).catch(() => undefined);
    });
  });
  afterAll(async () => {
    await proxy.stop("SIGTERM");
    for (const server of [...idps, protectedApi]) await server.stop();
  });

  test("the client discovers, gets a token and calls, with and without DPoP", async () => {
    for (const dpop of [false, true]) {
      const source = tokenSource(issuer, { resource, tls, dpop });
      const answer = await source.fetch(`${resource}/identity`);
      expect(answer.status).toBe(200);
      const claims = (await answer.json()) as { type: string; value: string }[];
      expect(claims).toContainEqual({ type: "iss", value: issuer });
      expect(claims).toContainEqual({ type: "aud", value: resource });
    }
  });

  test("documents stand where the RFCs say, and name the public addresses", async () => {
    const metadata = await send(`${issuer}/.well-known/openid-configuration`, trusting);
    expect(metadata.json).toMatchObject({
      ...{ issuer, token_endpoint: `${issuer}/connect/token` },
      jwks_uri: `${issuer}/.well-known/openid-configuration/jwks`,
    });
    // RFC 8414 §3.1: between host and path.
    const other = await send(`${origin}/.well-known/oauth-authorization-server/auth`, trusting);
    expect(other.json).toEqual(metadata.json);
    expect((await send(metadata.json.jwks_uri, trusting)).json.keys.length).toBe(2);
    const address = `${origin}/.well-known/oauth-protected-resource/v1`; // RFC 9728 §3.1
    const { json } = await send(address, trusting);
    expect(json).toMatchObject({ resource, authorization_servers: [issuer] });
    const refused = await send(`${resource}/identity`, trusting);
    expect(refused.status).toBe(401);
    expect(challenges(refused)["bearer"]).toEqual({ resource_metadata: address });
    const unauthorized = await send(`${issuer}/connect/token`, {
      ...trusting,
      method: "POST",
      body: new URLSearchParams(right).toString().replace("=secret", "=wrong"),
      headers: { "content-type": "application/x-www-form-urlencoded" },
    });
    expect(challenges(unauthorized)["basic"]).toEqual({ realm: issuer, charset: "UTF-8" });
  });

  test("a path without the prefix is not served", async () => {
    for (const [server, path] of [
      [idps[0]!, "/connect/token"],
      [idps[0]!, "/.well-known/openid-configuration"],
      [idps[0]!, "/health"],
      [protectedApi, "/identity"],
      [protectedApi, "/.well-known/oauth-protected-resource"],
    ] as const)
      expect((await send(`http://127.0.0.1:${server.server.port}${path}`)).status).toBe(404);
  });

  test("Host and X-Forwarded-* of a caller change nothing", async () => {
    const caller = await key();
    const forged = {
      host: "evil.example",
      "x-forwarded-host": "evil.example",
      "x-forwarded-proto": "http",
    };
    const direct = `http://127.0.0.1:${idps[0]!.server.port}/auth/connect/token`;
    const honest = await proof(caller, "POST", `${issuer}/connect/token`);
    const answer = await post(direct, right, { ...forged, dpop: honest });
    expect([answer.status, answer.json.token_type]).toEqual([200, "DPoP"]);
    const tricked = await proof(caller, "POST", "http://evil.example/auth/connect/token");
    expect((await post(direct, right, { ...forged, dpop: tricked })).json.error).toBe(
      "invalid_dpop_proof",
    );
  });

  test("an instance that stops costs no request: connections that nginx keeps are closed in time", async () => {
    let isStopped = false;
    const statuses = new Map<number, number>();
    const work = async () => {
      while (!isStopped) {
        const { status } = await send(`${issuer}/connect/token`, {
          ...{ ...trusting, method: "POST", body: new URLSearchParams(right) },
        });
        statuses.set(status, (statuses.get(status) ?? 0) + 1);
      }
    };
    const working = [work(), work(), work()];
    await eventually("both answer", () => idps.every(({ lines }) => lines.length > 10));
    await idps[0]!.stop();
    const after = idps[1]!.lines.length;
    await eventually("the other one answers alone", () => idps[1]!.lines.length > after + 10);
    isStopped = true;
    await Promise.all(working);
    expect([...statuses.keys()]).toEqual([200]);
    idps.shift();
  });
});
void authorizationServer;
