/**
 * Signing algorithms: for each one the whole flow, a token of the authorization server that the API
 * accepts, by a change of `signingKeys.algorithms` alone; and what the JWK Set tells about the keys.
 */

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import * as jose from "jose";
import { authorizationServer } from "../config.ts";
import {
  captureLog,
  cleanUp,
  freeOrigin,
  temporaryDirectory,
  thumbprint,
  withModule,
} from "./support.ts";

type Idp = typeof import("../idp.ts");
type Api = typeof import("../api.ts");

/** The public members of a key, in the order of the alphabet, and what is fixed of them. */
const rsa = { members: ["e", "kty", "n"], fixed: { kty: "RSA", e: "AQAB" }, bytes: { n: 256 } };
const okp = {
  members: ["crv", "kty", "x"],
  fixed: { kty: "OKP", crv: "Ed25519" },
  bytes: { x: 32 },
};
const ec = (crv: string, size: number) => ({
  members: ["crv", "kty", "x", "y"],
  fixed: { kty: "EC", crv },
  bytes: { x: size, y: size },
});
const akp = (size: number) => ({
  members: ["kty", "pub"],
  fixed: { kty: "AKP" },
  bytes: { pub: size },
});

interface Kind {
  members: string[];
  fixed: Record<string, string>;
  bytes: Record<string, number>;
}

const kinds: [alg: string, kind: Kind][] = [
  ["ES256", ec("P-256", 32)],
  ["RS256", rsa],
  ["PS256", rsa],
  ["EdDSA", okp],
  ["Ed25519", okp],
  ["ES384", ec("P-384", 48)],
  ["ES512", ec("P-521", 66)],
  ["ML-DSA-44", akp(1312)],
  ["ML-DSA-65", akp(1952)],
  ["ML-DSA-87", akp(2592)],
];

interface Flow {
  keys: Record<string, string>[];
  token: string;
  answer: Response;
}

const log = captureLog();
const stops: (() => Promise<void>)[] = [];

/** A token, and the answer of an API to it, with an authorization server of these algorithms. */
async function flow(algorithms: string[]): Promise<Flow> {
  const [issuer, resource] = [freeOrigin(), freeOrigin()];
  const scopes = [{ scope: "api1", description: "My API", resource }];
  const signingKeys = { ...authorizationServer.signingKeys, algorithms };
  const databaseUrl = `sqlite://${temporaryDirectory()}/keys.db`;
  const changes = {
    authorizationServer: { issuer, scopes, signingKeys, databaseUrl },
    resourceServer: { issuer, resource },
  };
  const idp = await withModule("idp", changes, (module: Idp) => module.start());
  const api = await withModule("api", changes, (module: Api) => module.start());
  stops.push(
    () => idp.stop(true),
    () => api.stop(true),
  );
  const document = await fetch(`${issuer}/.well-known/openid-configuration/jwks`);
  const { keys } = (await document.json()) as { keys: Record<string, string>[] };
  const headers = { authorization: `Basic ${btoa("client:secret")}` };
  const body = new URLSearchParams({ grant_type: "client_credentials" });
  const issued = await fetch(`${issuer}/connect/token`, { method: "POST", headers, body });
  const { access_token: token } = (await issued.json()) as { access_token: string };
  const authorization = `Bearer ${token}`;
  return {
    keys,
    token,
    answer: await fetch(`${resource}/identity`, { headers: { authorization } }),
  };
}

afterAll(async () => {
  log.stop();
  await Promise.all(stops.map((stop) => stop()));
  await cleanUp();
});

test("the thumbprint of RFC 7638 §3.1", () => {
  const n = [
    "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPeb",
    "WKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368Q",
    "QMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2",
    "NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw",
  ].join("");
  const jwk = { kty: "RSA", n, e: "AQAB", alg: "RS256", kid: "2011-04-29" };
  expect(thumbprint(jwk)).toBe("NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs");
});

describe.each(kinds)("signingKeys.algorithms [%s]", (alg, { members, fixed, bytes }) => {
  let flowing: Flow;

  beforeAll(async () => {
    flowing = await flow([alg]);
  }, 20_000);

  test("GET /jwks RFC 7517 §4 two keys with the public members, kid, alg and use, no more", () => {
    expect(flowing.keys).toHaveLength(2);
    for (const jwk of flowing.keys) {
      expect(Object.keys(jwk).toSorted()).toEqual([...members, "alg", "kid", "use"].toSorted());
      expect(jwk).toMatchObject({ ...fixed, alg, use: "sig" });
      for (const [member, size] of Object.entries(bytes)) {
        expect(Buffer.from(jwk[member]!, "base64url")).toHaveLength(size);
      }
    }
  });

  test("GET /jwks RFC 7638 kid is the thumbprint", () => {
    const kids = flowing.keys.map(({ kid }) => kid);
    expect(kids).toEqual(flowing.keys.map((jwk) => thumbprint(jwk)));
    expect(new Set(kids).size).toBe(2);
  });

  test("POST /connect/token RFC 9068 §2.1 the first of them signs", () => {
    const kid = flowing.keys[0]!["kid"];
    expect(jose.decodeProtectedHeader(flowing.token)).toEqual({ alg, kid: kid!, typ: "at+jwt" });
  });

  test("GET /identity RFC 9068 §4 the token is accepted → 200", async () => {
    const { answer, token } = flowing;
    expect(answer.status).toBe(200);
    const { jti } = jose.decodeJwt(token);
    expect(await answer.json()).toContainEqual({ type: "jti", value: jti });
  });
});

test("signingKeys.algorithms [ML-DSA-44, ES256, EdDSA]: the first signs, all are published", async () => {
  const { keys, token, answer } = await flow(["ML-DSA-44", "ES256", "EdDSA"]);
  const algs = keys.map(({ alg }) => alg).toSorted();
  expect(algs).toEqual(["ES256", "ES256", "EdDSA", "EdDSA", "ML-DSA-44", "ML-DSA-44"]);
  expect(jose.decodeProtectedHeader(token).alg).toBe("ML-DSA-44");
  expect(answer.status).toBe(200);
});
