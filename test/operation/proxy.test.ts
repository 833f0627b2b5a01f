/** Both servers behind a real nginx, which ends TLS and keeps the path: the addresses are public. */

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { eventually, freePort } from "../support/databases.ts";
import { challenges, post, refusalOf, send } from "../support/http.ts";
import { key, proof } from "../support/jwt.ts";
import { Program, temporaryDirectory } from "../support/programs.ts";
import { api, idp, tokenSource } from "../support/servers.ts";

setDefaultTimeout(30_000);

const nginx = Bun.which("nginx") ?? "/usr/sbin/nginx";
const missing = [nginx, Bun.which("openssl") ?? "openssl"].filter((file) => !existsSync(file));
const why = missing.length > 0 ? ` (skipped: ${missing.join(" and ")} not found)` : "";

describe.skipIf(missing.length > 0)(`behind nginx${why}`, () => {
  const directory = temporaryDirectory();
  const certificateFile = join(directory, "cert.pem");
  const tls = { certificateFile, keyFile: certificateFile, developmentFile: "" };
  const origin = `https://localhost:${freePort()}`;
  const [issuer, resource] = [`${origin}/auth`, `${origin}/v1`];
  const right = { grant_type: "client_credentials", client_id: "client", client_secret: "secret" };
  const get = (url: string) => send(url, { tls: { rejectUnauthorized: false } });
  /** A token request through nginx. */
  const ask = (parameters = right) => {
    const body = new URLSearchParams(parameters);
    return send(`${issuer}/connect/token`, { method: "POST", body, tls: { ca } });
  };
  let ca: string;
  const idps: Awaited<ReturnType<typeof idp>>[] = [];
  let protectedApi: Awaited<ReturnType<typeof api>>;
  let proxy: Program;

  beforeAll(async () => {
    const scopes = [{ scope: "api1", description: "My API", resource }];
    const databaseUrl = `sqlite://${join(directory, "keys.db")}`;
    const behind = { tls, listen: "127.0.0.1:0", drainSeconds: 0.1 };
    for (let index = 0; index < 2; index++)
      idps.push(await idp({ ...behind, issuer, scopes, databaseUrl }));
    protectedApi = await api(issuer, { ...behind, resource });
    const names = ["-addext", "subjectAltName=DNS:localhost", "-subj", "/CN=localhost"];
    const files = ["-keyout", certificateFile, "-out", certificateFile];
    const curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"];
    Bun.spawnSync(["openssl", "req", "-x509", "-nodes", ...curve, ...names, ...files]);
    ca = await Bun.file(certificateFile).text();
    const at = ({ server: { port } }: { server: Bun.Server<undefined> }) =>
      `server 127.0.0.1:${port};`;
    const file = join(directory, "nginx.conf");
    // What the README says, for two instances and an API, in directories of a user without rights.
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
        # A POST that an instance did not answer may be sent to the other one.
        proxy_next_upstream error timeout non_idempotent;
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
      return await get(`${issuer}/health`).catch(() => undefined);
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
    const { json: metadata } = await get(`${issuer}/.well-known/openid-configuration`);
    const jwks_uri = `${issuer}/.well-known/openid-configuration/jwks`;
    const token_endpoint = `${issuer}/connect/token`;
    expect(metadata).toMatchObject({ issuer, token_endpoint, jwks_uri });
    // RFC 8414 §3.1: between host and path.
    const between = await get(`${origin}/.well-known/oauth-authorization-server/auth`);
    expect(between.json).toEqual(metadata);
    expect((await get(jwks_uri)).json.keys).toHaveLength(2);
    const resource_metadata = `${origin}/.well-known/oauth-protected-resource/v1`; // RFC 9728 §3.1
    const { json } = await get(resource_metadata);
    expect(json).toMatchObject({ resource, authorization_servers: [issuer] });
    const refused = await get(`${resource}/identity`);
    expect([refused.status, challenges(refused)["bearer"]]).toEqual([401, { resource_metadata }]);
    const unauthorized = await ask({ ...right, client_secret: "wrong" });
    expect(unauthorized.status).toBe(401);
    expect(challenges(unauthorized)["basic"]).toEqual({ realm: issuer, charset: "UTF-8" });
  });

  test("Host and X-Forwarded-* of a caller change nothing", async () => {
    const caller = await key();
    const host = "evil.example";
    const forged = { host, "x-forwarded-host": host, "x-forwarded-proto": "http" };
    const direct = `http://127.0.0.1:${idps[0]!.server.port}/auth/connect/token`;
    const dpop = await proof(caller, "POST", `${issuer}/connect/token`);
    const answer = await post(direct, right, { ...forged, dpop });
    expect([answer.status, answer.json.token_type]).toEqual([200, "DPoP"]);
    const tricked = await proof(caller, "POST", `http://${host}/auth/connect/token`);
    const refused = await post(direct, right, { ...forged, dpop: tricked });
    expect(refusalOf(refused)).toBe("400 invalid_dpop_proof");
  });

  test("an instance that stops under load costs no request", async () => {
    let isStopped = false;
    const statuses = new Set<number>();
    const work = async () => {
      while (!isStopped) statuses.add((await ask()).status);
    };
    const working = [work(), work(), work()];
    await eventually("both answer", () => idps.every(({ lines }) => lines.length > 10));
    await idps.shift()!.stop();
    const { length } = idps[0]!.lines;
    await eventually("the other one answers", () => idps[0]!.lines.length > length + 10);
    isStopped = true;
    await Promise.all(working);
    expect([...statuses]).toEqual([200]);
  });
});
