/**
 * The authorization server with a client that has a secret: POST /connect/token (RFC 6749 §4.4,
 * RFC 8707, RFC 9068), the documents it publishes, and its log. Each row is one deviation from a
 * valid request; where several reasons give one answer, the log tells which one it was.
 */

import { Database } from "bun:sqlite";
import { afterAll, beforeAll, describe, expect, mock, test } from "bun:test";
import * as nodeCrypto from "node:crypto";
import { join } from "node:path";
import * as jose from "jose";
import { authorizationServer, type ClientRegistration, lifecycle } from "../config.ts";
import {
  captureLog,
  cleanUp,
  exchange,
  freeOrigin,
  launch,
  Program,
  root,
  signedJwt,
  temporaryDirectory,
  withinOneSecond,
  withModule,
} from "./support.ts";

type Idp = typeof import("../idp.ts");

const sha256 = (text: string) => nodeCrypto.createHash("sha256").update(text).digest("base64");
const seconds = () => Math.floor(Date.now() / 1000);

// --- Scopes and clients --------------------------------------------------------------------------

const myApi = "https://api.example";
const orders = "https://orders.example/v1";
const audit = "https://audit.example";
const scopes = [
  { scope: "api1", description: "My API", resource: myApi },
  { scope: "read", description: "Reading orders", resource: orders },
  { scope: "write", description: "Writing orders", resource: orders },
  { scope: "audit", description: "Auditing", resource: audit },
];

const secret = "0pen-Sesame";
const oddId = "käfer & söhne:1";
const oddSecret = "grün+rot 100%:=&";
const oldSecret = "last-Years-Word";
const nextSecret = "next-Years-Word";
const longSecret = "exactly-thirty-two-characters-ok";
const secretOf = (text: string, expires_at?: number) => ({
  sha256: sha256(text),
  ...(expires_at !== undefined && { expires_at }),
});
/** Its `expires_at` is set by a test. */
const expiring = secretOf(oldSecret, 1);

const { privateKey, publicKey } = await jose.generateKeyPair("ES256");
const jwks = { keys: [await jose.exportJWK(publicKey)] };

const client: ClientRegistration = {
  client_id: "client",
  client_secrets: [secretOf(secret)],
  grant_types: ["client_credentials"],
  scope: "api1",
  access_token_lifetime_seconds: 3600,
};
const { client_secrets, ...withoutSecrets } = client;
const ownClaims = {
  tenant: "blue",
  roles: ["a", "b"],
  limits: { daily: 10 },
  scopes: null,
};
const clients: ClientRegistration[] = [
  client,
  { ...client, client_id: "several", scope: "read api1 write" },
  { ...client, client_id: "orders", scope: "write read" },
  {
    ...client,
    client_id: "every",
    scope: scopes.map(({ scope }) => scope).join(" "),
  },
  { ...client, client_id: "short", access_token_lifetime_seconds: 1 },
  { ...client, client_id: "claims", claims: ownClaims },
  { ...client, client_id: oddId, client_secrets: [secretOf(oddSecret)] },
  {
    ...client,
    client_id: "colon",
    client_secrets: [secretOf("one:two:three")],
  },
  { ...client, client_id: "weak", client_secrets: [secretOf("x")] },
  { ...client, client_id: "spaces", client_secrets: [secretOf(`${secret} `)] },
  {
    ...client,
    client_id: "expired",
    client_secrets: [secretOf(oldSecret, seconds() - 1)],
  },
  {
    ...client,
    client_id: "rotating",
    client_secrets: [
      secretOf("before-Last-Word", 0),
      secretOf(oldSecret, 4_102_444_800),
      secretOf(nextSecret),
    ],
  },
  {
    ...client,
    client_id: "expiring",
    client_secrets: [expiring, secretOf(nextSecret)],
  },
  { ...withoutSecrets, client_id: "keyed", jwks },
  { ...withoutSecrets, client_id: "emptied", client_secrets: [], jwks },
  {
    ...client,
    client_id: "code",
    grant_types: ["authorization_code", "refresh_token"],
  },
  { ...client, client_id: "nothing", grant_types: [] },
  {
    ...client,
    client_id: "two grants",
    grant_types: ["refresh_token", "client_credentials"],
  },
];

// --- Servers -------------------------------------------------------------------------------------

const stops: (() => Promise<void>)[] = [];
const log = captureLog();
/** How many lines the requests so far make the servers log. */
let lines = 0;

/** Starts a server at a free port, where also its issuer is if the changes name no other. */
async function startIdp(changes: Partial<typeof authorizationServer> = {}, tries = 5) {
  const origin = freeOrigin();
  const databaseUrl = `sqlite://${temporaryDirectory()}/keys.db`;
  const settings = { issuer: origin, scopes, clients, databaseUrl, ...changes };
  process.env["ISSUER_LISTEN"] = new URL(origin).host;
  try {
    return await withModule("idp", { authorizationServer: settings }, async (module: Idp) => {
      const server = await module.start();
      stops.push(() => server.stop(true));
      return { origin, url: `${origin}/connect/token`, refresh: module.refresh };
    });
  } catch (error) {
    // Somebody else got the port meanwhile.
    if ((error as Error & { code?: string }).code !== "EADDRINUSE" || !tries) throw error;
    return await startIdp(changes, tries - 1);
  } finally {
    delete process.env["ISSUER_LISTEN"];
  }
}

const { origin: issuer, url: tokenEndpoint } = await startIdp();
const { host } = new URL(issuer);

afterAll(async () => {
  log.stop();
  await Promise.all(stops.map((stop) => stop()));
  await cleanUp();
});

// --- Requests ------------------------------------------------------------------------------------

/** What differs from a valid request, in which the id and secret of `client` are in the form. */
interface Deviation {
  /** A member that is undefined is left out. */
  form?: Record<string, string | undefined>;
  /** The Basic credentials, sent instead of those in the form. */
  basic?: string | Uint8Array;
  /** More of the body, as it is. */
  more?: string;
  /** The whole body, as it is. */
  body?: string | Uint8Array;
  headers?: Record<string, string>;
  query?: string;
}

interface Answer {
  status: number;
  headers: Record<string, string>;
  text: string;
  body: Record<string, unknown>;
  line: number;
}

const base64 = (text: string | Uint8Array) => Buffer.from(text).toString("base64");
const formType = "application/x-www-form-urlencoded";

function build({ form, basic, more = "", body, headers }: Deviation) {
  const credentials = { client_id: "client", client_secret: secret };
  const isInForm = basic === undefined && !headers?.["authorization"];
  const all = {
    grant_type: "client_credentials",
    ...(isInForm && credentials),
    ...form,
  };
  const present = Object.entries(all).filter((entry): entry is [string, string] => {
    return entry[1] !== undefined;
  });
  return {
    body: body ?? `${new URLSearchParams(present)}${more}`,
    headers: {
      "content-type": formType,
      ...(basic !== undefined && { authorization: `Basic ${base64(basic)}` }),
      ...headers,
    },
  };
}

async function post(deviation: Deviation, url = tokenEndpoint): Promise<Answer> {
  const { query = "" } = deviation;
  const response = await fetch(url + query, {
    method: "POST",
    ...build(deviation),
  });
  lines += 1;
  const { date, "content-length": length, ...headers } = response.headers.toJSON();
  const text = await response.text();
  return {
    status: response.status,
    headers,
    text,
    body: JSON.parse(text),
    line: lines - 1,
  };
}

/** The same request as bytes; what comes back is without its date. */
async function postRaw(deviation: Deviation, fields = "", start = "POST /connect/token HTTP/1.1") {
  const { body, headers } = build(deviation);
  const own = Object.entries({ host, connection: "close", ...headers });
  const head = own.map(([name, value]) => `${name}: ${value}\r\n`).join("");
  const length = `content-length: ${Buffer.byteLength(body)}\r\n`;
  const answer = await exchange(issuer, `${start}\r\n${head}${fields}${length}\r\n${body}`);
  return answer.replace(/\r\nDate: [^\r]*/, "");
}

const noStore = { "cache-control": "no-store", pragma: "no-cache" };
const fields = { ...noStore, "content-type": "application/json;charset=utf-8" };
const challenge = `Basic realm="${issuer}", charset="UTF-8"`;
const invalidClientText =
  '{"error":"invalid_client","error_description":' +
  '"Client authentication failed. The log of the server has the reason."}';

// --- Rows of the token endpoint ------------------------------------------------------------------

/** What is granted where it is not what `client` gets, to the client that the form names. */
interface Grant {
  client_id?: string;
  aud?: string;
  scope?: string;
  expires_in?: number;
}

const asClient = (client_id: string, form: Deviation["form"] = {}): Deviation => ({
  form: { client_id, ...form },
});
const withScope = (scope: string): Deviation => ({ form: { scope } });
const odd = { client_id: oddId };

const accepted: [rule: string, deviation: Deviation, grant?: Grant][] = [
  ["§4.4.2 a valid request", {}],
  ["§2.3.1 client_secret_basic", { basic: `client:${secret}` }],
  [
    "9110 §11.1 the scheme in small letters",
    { headers: { authorization: `basic ${base64(`client:${secret}`)}` } },
  ],
  [
    "9110 §11.1 the scheme in capitals, several spaces",
    { headers: { authorization: `BASIC   ${base64(`client:${secret}`)}` } },
  ],
  [
    "§2.3.1 Basic, both halves form-encoded",
    { basic: "k%C3%A4fer+%26+s%c3%b6hne%3A1:gr%C3%BCn%2Brot+100%25%3A%3D%26" },
    odd,
  ],
  [
    "§2.3.1 Basic, a space as %20",
    {
      basic: "k%C3%A4fer%20%26%20s%C3%B6hne%3A1:gr%C3%BCn%2Brot%20100%25%3A%3D%26",
    },
    odd,
  ],
  ["7617 §2.1 Basic, UTF-8 as it is", { basic: "käfer+&+söhne%3A1:grün%2Brot+100%25:=&" }, odd],
  ["7617 §2 Basic, colons in the secret", { basic: "colon:one:two:three" }, { client_id: "colon" }],
  [
    "§3.2.1 Basic, and client_id that agrees",
    { basic: `client:${secret}`, form: { client_id: "client" } },
  ],
  [
    "§3.2 Basic, and empty client_id and client_secret",
    { basic: `client:${secret}`, form: { client_id: "", client_secret: "" } },
  ],
  [
    "Appendix B client_secret_post, odd characters",
    { form: { client_id: oddId, client_secret: oddSecret } },
  ],
  [
    "client_secret_post, a space at the end of the secret",
    asClient("spaces", { client_secret: `${secret} ` }),
  ],
  ["a secret of one character, on a loopback issuer", asClient("weak", { client_secret: "x" })],
  [
    "the second of several secrets, before it expires",
    asClient("rotating", { client_secret: oldSecret }),
  ],
  ["the last of several secrets", asClient("rotating", { client_secret: nextSecret })],
  ["a client of two grant types", asClient("two grants")],

  [
    "9110 §8.3.1 Content-Type with a charset",
    { headers: { "content-type": `${formType};charset=UTF-8` } },
  ],
  [
    "9110 §8.3.1 Content-Type in capitals, space before the semicolon",
    {
      headers: { "content-type": `${formType.toUpperCase()} ; charset=utf-8` },
    },
  ],
  [
    "Appendix B names and values percent-encoded",
    {
      form: { grant_type: undefined },
      more: "&%67rant%5Ftype=client%5fcredentials",
    },
  ],
  ["§3.2 an unknown parameter", { form: { audience: "x", client: "y" } }],
  ["§3.2 an unknown parameter twice", { more: "&x=1&x=2" }],
  ["§3.2 parameters named like members of every object", { more: "&__proto__=1&constructor=2" }],
  ["§3.2 empty pairs", { more: "&&=&" }],
  ["§3.2 an empty scope counts as absent, and is not echoed", withScope("")],
  ["§3.2 scope without =", { more: "&scope" }],
  ["§3.2 an empty resource counts as absent", { form: { resource: "" } }],
  [
    "§3.2 an empty assertion counts as absent",
    { more: "&client_assertion=&client_assertion_type=" },
  ],
  ["§3.2 scope in the query is not read", { query: "?scope=nothing" }],
  [
    "§3.2 the same parameters in the query do not count as repeated",
    { query: "?grant_type=client_credentials&client_id=client" },
  ],
  ["§3.2 resource in the query is not read", { query: `?resource=${audit}` }],
  [
    "§2.3.1 client_secret in the query is not a second way",
    { basic: `client:${secret}`, query: "?client_secret=x" },
  ],

  ["§3.3 the scope that is registered", withScope("api1")],
  ["§3.3 a scope twice", withScope("api1 api1")],
  [
    "§3.3 no scope, all at the only resource",
    asClient("orders"),
    { aud: orders, scope: "write read" },
  ],
  ["§3.3 one of two scopes", asClient("orders", { scope: "read" }), { aud: orders, scope: "read" }],
  [
    "§3.3 two scopes of one resource, a space as %20",
    { form: { client_id: "several" }, more: "&scope=write%20read" },
    { aud: orders, scope: "write read" },
  ],
  [
    "§3.3 two scopes of one resource, a space as +",
    { form: { client_id: "several" }, more: "&scope=read+write" },
    { aud: orders, scope: "read write" },
  ],
  [
    "§3.3 two scopes, one of them twice",
    asClient("several", { scope: "write read write" }),
    { aud: orders, scope: "write read" },
  ],
  ["§3.3 the scope decides the resource", asClient("several", { scope: "api1" }), { aud: myApi }],
  ["8707 §2 the only resource named", { form: { resource: myApi } }],
  [
    "8707 §2 resource alone, all scopes there",
    asClient("several", { resource: orders }),
    { aud: orders, scope: "read write" },
  ],
  ["8707 §2 another resource alone", asClient("several", { resource: myApi }), { aud: myApi }],
  [
    "8707 §2.2 resource and one scope of it",
    asClient("several", { resource: orders, scope: "write" }),
    { aud: orders, scope: "write" },
  ],
  [
    "8707 §2.2 resource and an empty scope",
    asClient("several", { resource: orders, scope: "" }),
    { aud: orders, scope: "read write" },
  ],

  ["a lifetime of its own", asClient("short"), { expires_in: 1 }],
  ["claims of its own", asClient("claims")],
];

const twice = "authenticates in more than one way";
const malformedUri = "URI error";
const basicAnd = (authorization: string): Deviation => ({
  headers: { authorization },
  form: { client_id: "client", client_secret: secret },
});
const withMore = (more: string): Deviation => ({ more });
const bytes = (...codes: number[]) =>
  Buffer.concat([Buffer.from(`${build({}).body}&scope=`), Buffer.from(codes)]);

/** Without a reason, the one of all rows with the same code. */
type RefusedRow = [rule: string, deviation: Deviation, reason?: string];

const invalidRequest: RefusedRow[] = [
  [
    "§4.4.2 Content-Type application/json",
    {
      body: JSON.stringify({ grant_type: "client_credentials" }),
      headers: { "content-type": "application/json" },
    },
    "not a form",
  ],
  ["§4.4.2 Content-Type text/plain", { headers: { "content-type": "text/plain" } }, "not a form"],
  [
    "§4.4.2 Content-Type multipart/form-data",
    { headers: { "content-type": "multipart/form-data; boundary=x" } },
    "not a form",
  ],
  [
    "§4.4.2 Content-Type with a character more",
    { headers: { "content-type": `${formType}2` } },
    "not a form",
  ],
  [
    "§4.4.2 Content-Type of a form as a parameter",
    { headers: { "content-type": `text/plain; ${formType}` } },
    "not a form",
  ],
  [
    "§4.4.2 no Content-Type",
    { body: Buffer.from(`${build({}).body}`), headers: { "content-type": "" } },
    "not a form",
  ],
  ["§3.2 grant_type twice", withMore("&grant_type=client_credentials"), "grant_type is repeated"],
  ["§3.2 client_id twice", withMore("&client_id=client"), "client_id is repeated"],
  ["§3.2 client_secret twice", withMore(`&client_secret=${secret}`), "client_secret is repeated"],
  ["§3.2 scope twice", withMore("&scope=api1&scope=api1"), "scope is repeated"],
  ["§3.2 scope twice, the first one empty", withMore("&scope=&scope=api1"), "scope is repeated"],
  ["§3.2 scope twice, the second one empty", withMore("&scope=api1&scope"), "scope is repeated"],
  ["§3.2 scope twice, both empty", withMore("&scope=&scope="), "scope is repeated"],
  [
    "§3.2 scope twice, once percent-encoded",
    withMore("&scope=api1&%73cope=api1"),
    "scope is repeated",
  ],
  [
    "§3.2 client_assertion twice, both empty",
    withMore("&client_assertion=&client_assertion="),
    "client_assertion is repeated",
  ],
  [
    "§3.2 client_assertion_type twice, both empty",
    withMore("&client_assertion_type=&client_assertion_type="),
    "client_assertion_type is repeated",
  ],
  ["Appendix B % alone", withMore("&scope=%"), malformedUri],
  ["Appendix B % before what is not hexadecimal", withMore("&scope=api1%zz"), malformedUri],
  ["Appendix B % in a name", withMore("&%zz=1"), malformedUri],
  ["Appendix B % in an unknown parameter", withMore("&x=%"), malformedUri],
  ["Appendix B percent-encoded bytes that are not UTF-8", withMore("&scope=%C3%28"), malformedUri],
  ["Appendix B a percent-encoded surrogate", withMore("&scope=%ED%A0%80"), malformedUri],
  ["Appendix B a byte that is not UTF-8", { body: bytes(0xff) }, "not UTF-8"],
  ["Appendix B Latin-1", { body: bytes(0xe4, 0x70) }, "not UTF-8"],
  ["Appendix B a percent-encoded NUL", withMore("&scope=api1%00"), "NUL in a parameter"],
  ["Appendix B NUL as it is", { body: bytes(0) }, "NUL in a parameter"],
  [
    "Appendix B NUL in the secret",
    { form: { client_secret: `${secret}\0` } },
    "NUL in a parameter",
  ],
  ["Appendix B NUL in a name", withMore("&x%00=1"), "NUL in a parameter"],
  ["§2.3 Basic and client_secret", basicAnd(`Basic ${base64(`client:${secret}`)}`)],
  ["§2.3 Bearer and client_secret", basicAnd("Bearer token")],
  ["§2.3 an unknown scheme and client_secret", basicAnd("x")],
  ["§2.3 malformed Basic and client_secret", basicAnd("Basic")],
  ["§2.3 an empty Authorization field and client_secret", basicAnd("")],
  [
    "§2.3 two ways of an unknown client",
    {
      ...basicAnd("Bearer token"),
      form: { client_id: "nobody", client_secret: "x" },
    },
  ],
  [
    "§3.2.1 Basic and another client_id",
    { basic: `client:${secret}`, form: { client_id: "several" } },
    "two client ids",
  ],
  [
    "§3.2.1 Basic with a wrong secret, and another client_id",
    { basic: "client:wrong", form: { client_id: "several" } },
    "two client ids",
  ],
  [
    "§3.2.1 Basic and client_id in capitals",
    { basic: `client:${secret}`, form: { client_id: "CLIENT" } },
    "two client ids",
  ],
  ["§4.4.2 no grant_type", { form: { grant_type: undefined } }, "no grant_type"],
  ["§3.2 an empty grant_type", { form: { grant_type: "" } }, "no grant_type"],
  [
    "§3.2 grant_type in the query alone",
    {
      form: { grant_type: undefined },
      query: "?grant_type=client_credentials",
    },
    "no grant_type",
  ],
  [
    "Content-Type before the parameters and the client",
    {
      form: { client_secret: "wrong" },
      more: "&scope=%",
      headers: { "content-type": "text/plain" },
    },
    "not a form",
  ],
  [
    "the parameters before the client",
    { form: { client_secret: "wrong" }, more: "&scope=x&scope=x" },
    "scope is repeated",
  ],
];

const unknown = "unknown client";
const wrong = "wrong secret";
const none = "no credentials";
const noColon = "no colon in Basic";
const noBasic = "no Basic credentials in Authorization";
const notBase64 = "Uint8Array.fromBase64 requires a valid base64 string";
const authorization = (field: string): Deviation => ({
  headers: { authorization: field },
});
const basic = (credentials: string | Uint8Array): Deviation => ({
  basic: credentials,
});
const noCredentials = { client_id: undefined, client_secret: undefined };

const invalidClient: RefusedRow[] = [
  ["§3.2.1 no credentials", { form: noCredentials }, none],
  ["§3.2.1 client_id alone", { form: { client_secret: undefined } }, none],
  ["§3.2 client_id and an empty client_secret", { form: { client_secret: "" } }, none],
  ["§3.2.1 client_secret alone", { form: { client_id: undefined } }, unknown],
  [
    "§2.3.1 credentials in the query alone",
    { form: noCredentials, query: `?client_id=client&client_secret=${secret}` },
    none,
  ],
  [
    "§2.3.1 client_secret in the query",
    { form: { client_secret: undefined }, query: `?client_secret=${secret}` },
    none,
  ],
  ["§5.2 unknown client, in the form", asClient("nobody"), unknown],
  ["§5.2 unknown client, in Basic", basic(`nobody:${secret}`), unknown],
  ["§5.2 client_id in capitals", asClient("CLIENT"), unknown],
  ["§5.2 client_id with a space", asClient("client "), unknown],
  ["§5.2 client_id __proto__", asClient("__proto__"), unknown],
  ["§5.2 client_id constructor", asClient("constructor"), unknown],
  ["§5.2 client_id toString, in Basic", basic(`toString:${secret}`), unknown],
  ["§5.2 wrong secret, in the form", { form: { client_secret: "wrong" } }],
  ["§5.2 wrong secret, in Basic", basic("client:wrong")],
  ["§5.2 secret in capitals", { form: { client_secret: secret.toUpperCase() } }],
  ["§5.2 secret with a space", { form: { client_secret: `${secret} ` } }],
  ["§5.2 the beginning of the secret", { form: { client_secret: secret.slice(0, -1) } }],
  ["§5.2 the hash instead of the secret", { form: { client_secret: sha256(secret) } }],
  ["§5.2 the secret of another client", { form: { client_secret: oldSecret } }],
  ["§5.2 an expired secret", asClient("expired", { client_secret: oldSecret }), "expired secret"],
  [
    "§5.2 the expired one of several secrets",
    asClient("rotating", { client_secret: "before-Last-Word" }),
    "expired secret",
  ],
  ["§5.2 none of several secrets", asClient("rotating")],
  ["§5.2 a secret of a client that has a key", asClient("keyed")],
  ["§5.2 a client with an empty list of secrets", asClient("emptied")],
  [
    "§5.2 44 spaces, a client without secrets",
    asClient("keyed", { client_secret: " ".repeat(44) }),
  ],
  ["§5.2 Bearer alone", authorization("Bearer token"), noBasic],
  ["§5.2 Digest alone", authorization('Digest username="client", qop=auth, nc=00000001'), noBasic],
  [
    "§5.2 Digest alone, with a comma in quotation marks",
    authorization('Digest username="a, b c", realm="x"'),
    noBasic,
  ],
  ["§5.2 DPoP alone", authorization("DPoP token"), noBasic],
  [
    "§5.2 an unknown scheme, Basic at its end",
    authorization(`XBasic ${base64(`client:${secret}`)}`),
    noBasic,
  ],
  ["7617 §2 Basic alone", authorization("Basic"), noBasic],
  ["7617 §2 Basic without a space", authorization(`Basic${base64(`client:${secret}`)}`), noBasic],
  [
    "7617 §2 Basic with something after the credentials",
    authorization(`Basic ${base64(`client:${secret}`)} x`),
    noBasic,
  ],
  ["7617 §2 Basic that is not base64", authorization("Basic client:secret"), notBase64],
  ["7617 §2 Basic in base64url", authorization("Basic Y2xp_W50-A=="), notBase64],
  ["7617 §2 no colon in Basic", basic("client"), noColon],
  ["7617 §2 no colon in Basic, the secret alone", basic(secret), noColon],
  ["7617 §2 an empty secret in Basic", basic("client:"), none],
  ["7617 §2 an empty client_id in Basic", basic(`:${secret}`), unknown],
  ["7617 §2 the colon of Basic percent-encoded", basic(`client%3A${secret}`), noColon],
  ["§2.3.1 malformed percent-encoding of the secret in Basic", basic("client:100%"), malformedUri],
  ["§2.3.1 malformed percent-encoding of the id in Basic", basic(`cl%i:${secret}`), malformedUri],
  ["§2.3.1 percent-encoded bytes in Basic that are not UTF-8", basic("client:%FF"), malformedUri],
  [
    "§2.3.1 + in Basic means a space",
    basic("k%C3%A4fer+%26+s%C3%B6hne%3A1:gr%C3%BCn+rot+100%25%3A%3D%26"),
  ],
  ["§2.3.1 a space at the end in Basic", basic(`client:${secret}+`)],
  [
    "7617 §2.1 Latin-1 in Basic",
    basic(Buffer.from("käfer:x", "latin1")),
    "The encoded data was not valid for encoding utf-8",
  ],
  ["7617 §2.1 a byte order mark in Basic", basic(`\uFEFFclient:${secret}`), unknown],
  ["7617 §2 NUL in Basic", basic(`client\0:${secret}`), "NUL in a parameter"],
  ["7617 §2 a percent-encoded NUL in Basic", basic(`client:${secret}%00`), "NUL in a parameter"],
  ["the client before its grant types", asClient("nothing", { client_secret: "wrong" })],
  ["the client before grant_type", { form: { client_secret: "wrong", grant_type: "password" } }],
  [
    "the client before a missing grant_type",
    { form: { client_secret: "wrong", grant_type: undefined } },
  ],
  [
    "the client before scope and resource",
    { form: { client_secret: "wrong", scope: "x", resource: "x" } },
  ],
];

const ofGrant = (grant_type: string): Deviation => ({ form: { grant_type } });

const unsupportedGrantType: RefusedRow[] = [
  ["§5.2 grant_type authorization_code", ofGrant("authorization_code")],
  ["§5.2 grant_type password", ofGrant("password")],
  ["§5.2 grant_type refresh_token", ofGrant("refresh_token")],
  ["§5.2 grant_type of RFC 7523 §2.1", ofGrant("urn:ietf:params:oauth:grant-type:jwt-bearer")],
  ["§5.2 unknown grant_type", ofGrant("x")],
  ["§5.2 grant_type in capitals", ofGrant("CLIENT_CREDENTIALS")],
  ["§5.2 grant_type with a space", ofGrant("client_credentials ")],
  ["§5.2 grant_type __proto__", ofGrant("__proto__")],
  [
    "§5.2 another grant_type that is registered for the client",
    asClient("code", { grant_type: "authorization_code" }),
  ],
  ["grant_type before the proof", { ...ofGrant("x"), headers: { dpop: "x" } }],
  [
    "grant_type before scope and resource",
    { form: { grant_type: "x", scope: "x", resource: "x" } },
  ],
];

const unauthorizedClient: RefusedRow[] = [
  ["§5.2 a client of other grant types", asClient("code")],
  ["§5.2 a client without grant types", asClient("nothing")],
  [
    "the grant types of the client before the proof",
    { ...asClient("nothing"), headers: { dpop: "x" } },
  ],
  [
    "the grant types of the client before scope and resource",
    asClient("code", { scope: "x", resource: "x" }),
  ],
];

const invalidScope: RefusedRow[] = [
  ["§3.3 an unknown scope", withScope("api2")],
  ["§3.3 an unknown scope after one that is granted", withScope("api1 api2")],
  ["§3.3 an unknown scope before one that is granted", withScope("api2 api1")],
  ["§3.3 a scope of another client", withScope("read")],
  [
    "§3.3 a scope of another client at the same resource",
    asClient("several", { scope: "read audit" }),
  ],
  ["§3.3 scope in capitals", withScope("API1")],
  ["§3.3 a space alone", withScope(" ")],
  ["§3.3 a space before", withScope(" api1")],
  ["§3.3 a space after", withScope("api1 ")],
  ["§3.3 two spaces", withScope("api1  api1")],
  ["§3.3 a tab", withScope("api1\tapi1")],
  ["§3.3 a comma", asClient("orders", { scope: "read,write" })],
  ["§3.3 a quotation mark", withScope('"api1"')],
  ["§3.3 a letter that is not ASCII", withScope("äpi1")],
  ["§3.3 scope __proto__", withScope("__proto__")],
  ["§3.3 scope constructor", withScope("constructor")],
  ["§3.3 no scope, several resources", asClient("several")],
  ["§3.2 an empty scope, several resources", asClient("several", { scope: "" })],
  ["8707 §2.2 scopes of two resources", asClient("several", { scope: "api1 read" })],
  [
    "8707 §2.2 scopes of two resources, the other first",
    asClient("several", { scope: "write read api1" }),
  ],
  [
    "8707 §2.2 a scope of another resource than named",
    asClient("several", { scope: "api1", resource: orders }),
  ],
  [
    "8707 §2.2 scopes of the resource named and of another",
    asClient("several", { scope: "read api1", resource: orders }),
  ],
  ["8707 §2.2 an unknown scope at the resource named", withScopeAt("api2", myApi)],
];

function withScopeAt(scope: string, resource: string): Deviation {
  return { form: { scope, resource } };
}
const at = (resource: string): Deviation => ({ form: { resource } });

const invalidTarget: RefusedRow[] = [
  ["8707 §2 an unknown resource", at("https://other.example")],
  ["8707 §2 a resource where the client has no scope", at(audit)],
  [
    "8707 §2 a resource where the client has no scope, though it has several",
    asClient("several", { resource: audit }),
  ],
  ["8707 §2 a slash at the end", at(`${myApi}/`)],
  ["8707 §2 a path", at(`${myApi}/identity`)],
  [
    "8707 §2 the beginning of a resource",
    asClient("several", { resource: "https://orders.example" }),
  ],
  ["8707 §2 a query", at(`${myApi}?x=1`)],
  ["8707 §2 a fragment", at(`${myApi}#x`)],
  ["8707 §2 an empty fragment", at(`${myApi}#`)],
  ["8707 §2 relative", at("//api.example")],
  ["8707 §2 the host in capitals", at("https://API.example")],
  ["8707 §2 the default port written out", at(`${myApi}:443`)],
  ["8707 §2 a space at the end", at(`${myApi} `)],
  ["8707 §2 the name of a scope", at("api1")],
  ["8707 §2 the issuer", at(issuer)],
  ["8707 §2 resource __proto__", at("__proto__")],
  ["8707 §2 one resource twice", withMore(`&resource=${myApi}&resource=${myApi}`)],
  [
    "8707 §2 two resources",
    { ...asClient("several"), more: `&resource=${orders}&resource=${myApi}` },
  ],
  ["8707 §2 two resources, the first one empty", withMore(`&resource=&resource=${myApi}`)],
  ["8707 §2 two resources, the second one empty", withMore(`&resource=${myApi}&resource=`)],
  ["8707 §2 two empty resources", withMore("&resource=&resource=")],
  ["8707 §2 three resources", withMore(`&resource=${myApi}&resource=&resource=${myApi}`)],
  ["resource before scope", withScopeAt("x", "https://other.example")],
];

/** By code: the status, the text, the reason where a row has none, the rows. */
const refusals: [string, number, string, string, RefusedRow[]][] = [
  [
    "invalid_request",
    400,
    "The request is malformed, repeats a parameter or authenticates twice.",
    twice,
    invalidRequest,
  ],
  [
    "invalid_client",
    401,
    "Client authentication failed. The log of the server has the reason.",
    wrong,
    invalidClient,
  ],
  [
    "unsupported_grant_type",
    400,
    "The only grant type here is client_credentials.",
    "another one",
    unsupportedGrantType,
  ],
  [
    "unauthorized_client",
    400,
    "The client is not registered for this grant type.",
    "not registered",
    unauthorizedClient,
  ],
  [
    "invalid_scope",
    400,
    "The scope is unknown, not granted, or belongs to several resources.",
    "unknown, not granted or of several resources",
    invalidScope,
  ],
  [
    "invalid_target",
    400,
    "The resource is unknown, repeated, or one without a granted scope.",
    "no scope there",
    invalidTarget,
  ],
];

/** Rows name the section alone where it is one of RFC 6749, and other RFCs by their number. */
const named = <Any extends [string, ...unknown[]]>(rows: Any[]): Any[] =>
  rows.map(([rule, ...rest]) => {
    const full = rule.replace(/^(?:(\d{4}) )?(?=§|Appendix)/, (_, rfc = 6749) => `RFC ${rfc} `);
    return [full, ...rest] as Any;
  });

const registered = clients.map(({ client_id }) => client_id);
const answers = new Map<Deviation, Answer>();
const answeredWithin = new Map<Deviation, number>();
let published: ReturnType<typeof jose.createLocalJWKSet>;

beforeAll(async () => {
  // All rows are sent first, one after the other, for the log is written every 50 ms.
  const rows = [accepted, ...refusals.map(([, , , , each]) => each)].flat();
  for (const [, deviation] of rows) {
    const started = performance.now();
    answers.set(deviation, await post(deviation));
    answeredWithin.set(deviation, performance.now() - started);
  }
  await log.until(lines);
  const response = await fetch(`${issuer}/.well-known/openid-configuration/jwks`);
  published = jose.createLocalJWKSet((await response.json()) as jose.JSONWebKeySet);
});

describe("POST /connect/token", () => {
  test.each(named(accepted))("%s → 200", async (_, deviation, grant = {}) => {
    const { status, headers, body, line } = answers.get(deviation)!;
    const client_id = grant.client_id ?? (deviation.form?.["client_id"] || "client");
    const { aud = myApi, scope = "api1", expires_in = 3600 } = grant;
    expect(log.requests[line]).not.toContainKeys(["error", "reason"]);
    expect(status).toBe(200);
    expect(headers).toEqual(fields);
    const { access_token, ...rest } = body;
    expect(rest).toEqual({ token_type: "Bearer", expires_in, scope });

    const issuedAt = jose.decodeJwt(`${access_token}`).iat!;
    const { payload, protectedHeader } = await jose.jwtVerify(`${access_token}`, published, {
      currentDate: new Date(issuedAt * 1000),
    });
    const { kid, ...header } = protectedHeader;
    expect(header).toEqual({ alg: "ES256", typ: "at+jwt" });
    const { iat = 0, jti, ...claims } = payload;
    const own = client_id === "claims" ? ownClaims : {};
    const exp = iat + expires_in;
    expect(claims).toEqual({
      ...{ iss: issuer, sub: client_id, aud, client_id, scope, nbf: iat, exp },
      ...own,
    });
    const names = ["iss", "sub", "aud", "client_id", "scope", "iat", "nbf", "exp", "jti"];
    expect(Object.keys(payload)).toEqual([...names, ...Object.keys(own)]);
    expect(jti).toMatch(/^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);

    const { time, milliseconds, ...entry } = log.requests[line]!;
    expect(entry).toEqual({
      ...{
        event: "token issued",
        address: "127.0.0.1",
        client_id,
        scope,
        kid,
        jti,
      },
    });
    expectTimes(time, milliseconds, deviation);
    const logged = Date.parse(`${time}`) / 1000;
    expect(logged - iat).toBeWithin(0, 1 + answeredWithin.get(deviation)! / 1000);
  });

  for (const [code, status, error_description, usual, rows] of refusals) {
    test.each(named(rows))(`%s → ${status} ${code}`, (_, deviation, reason = usual) => {
      const { status: sent, headers, text, line } = answers.get(deviation)!;
      const { time, milliseconds, client_id, ...entry } = log.requests[line]!;
      if (client_id !== undefined) expect(registered).toContain(`${client_id}`);
      const address = "127.0.0.1";
      expect(entry).toEqual({
        event: "token refused",
        address,
        error: code,
        reason,
      });
      expectTimes(time, milliseconds, deviation);
      expect(sent).toBe(status);
      const more = status === 401 ? { "www-authenticate": challenge } : {};
      expect(headers).toEqual({ ...fields, ...more });
      expect(text).toBe(JSON.stringify({ error: code, error_description }));
      // RFC 6749 §5.2: the characters that error_description may have.
      expect(error_description).toMatch(/^[\x20-\x21\x23-\x5B\x5D-\x7E]+$/);
    });
  }

  function expectTimes(time: unknown, milliseconds: unknown, deviation: Deviation): void {
    expect(time).toMatch(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/);
    expect(milliseconds).toBeInteger();
    expect(milliseconds).toBeWithin(0, Math.ceil(answeredWithin.get(deviation)!) + 1);
  }

  test("RFC 9068 §2.2 each token has a jti of its own", () => {
    const tokens = accepted.map(([, deviation]) => answers.get(deviation)!.body["access_token"]);
    const jtis = tokens.map((token) => jose.decodeJwt(`${token}`).jti);
    expect(new Set(jtis).size).toBe(accepted.length);
  });

  test("RFC 6749 §5.2 every 401 is the same, byte for byte", async () => {
    const sent = await Promise.all(invalidClient.map(([, { query, ...each }]) => postRaw(each)));
    lines += sent.length;
    const answer = [
      "HTTP/1.1 401 Unauthorized",
      "Cache-Control: no-store",
      "Pragma: no-cache",
      "Content-Type: application/json;charset=utf-8",
      `www-authenticate: ${challenge}`,
      `Content-Length: ${invalidClientText.length}`,
      "",
      invalidClientText,
    ];
    expect(sent[0]).toBe(answer.join("\r\n"));
    expect(new Set(sent).size).toBe(1);
  });

  const twoFields: [rule: string, one: string, two: string][] = [
    ["the same Basic twice", "Basic Y2xpZW50Ong=", "Basic Y2xpZW50Ong="],
    ["Basic, then Bearer", "Basic Y2xpZW50Ong=", "Bearer token"],
    ["Bearer, then Basic", "Bearer token", "Basic Y2xpZW50Ong="],
    ["an empty one, then Basic", "", "Basic Y2xpZW50Ong="],
    ["Basic, then a scheme alone", "Basic Y2xpZW50Ong=", "Negotiate"],
    ["Basic, then a scheme with a dot", "Basic Y2xpZW50Ong=", "Foo.Bar x"],
    ["a scheme with a dot, then Basic", "Foo.Bar x", "Basic Y2xpZW50Ong="],
    ["Basic, then a scheme of odd letters", "Basic Y2xpZW50Ong=", "!#$%&'*+-.^_`|~1aZ x"],
    ["Digest, then Basic", 'Digest username="a, b c", realm="x"', "Basic Y2xpZW50Ong="],
  ];
  const raw = new Map<string, { answer: string; line: number }>();

  beforeAll(async () => {
    for (const [name, one, two] of twoFields) {
      const more = `Authorization: ${two}\r\n`;
      const answer = await postRaw({ form: noCredentials, headers: { authorization: one } }, more);
      raw.set(name, { answer, line: lines++ });
    }
    const answer = await postRaw({}, `Content-Type: ${formType}\r\n`);
    raw.set("Content-Type", { answer, line: lines++ });
    const head = `POST /connect/token HTTP/1.1\r\nHost: ${host}\r\nConnection: close\r\n`;
    raw.set("nothing", {
      answer: await exchange(issuer, `${head}\r\n`),
      line: lines++,
    });
    await log.until(lines);
  });

  test.each(twoFields)(
    "RFC 6749 §2.3 two Authorization fields, %s → 400 invalid_request",
    (name) => {
      const { answer, line } = raw.get(name)!;
      expect(answer).toStartWith("HTTP/1.1 400 Bad Request\r\n");
      expect(answer).not.toContain("www-authenticate");
      expect(answer).toContain('{"error":"invalid_request",');
      expect(log.requests[line]!["reason"]).toBe(twice);
    },
  );

  const contentTypes = [
    ["two Content-Type fields", "Content-Type"],
    ["neither Content-Type nor body", "nothing"],
  ];
  test.each(contentTypes)("RFC 6749 §4.4.2 %s → 400 invalid_request", (_, name) => {
    const { answer, line } = raw.get(name!)!;
    expect(answer).toStartWith("HTTP/1.1 400 Bad Request\r\n");
    expect(log.requests[line]!["reason"]).toBe("not a form");
  });

  test("RFC 6749 §5.2 a secret is refused from the second on in which it expires", async () => {
    const statuses = async (expires_at: number) => {
      expiring.expires_at = expires_at;
      const sent = [oldSecret, nextSecret].map((client_secret) =>
        post(asClient("expiring", { client_secret })),
      );
      return (await Promise.all(sent)).map(({ status }) => status);
    };
    const [before, then, after] = await withinOneSecond(async (now) => [
      await statuses(now + 1),
      await statuses(now),
      await statuses(now - 1),
    ]);
    expect(before).toEqual([200, 200]);
    expect(then).toEqual([401, 200]);
    expect(after).toEqual([401, 200]);
  });

  const paths: [name: string, client_id: string, presented: string, status: number][] = [
    ["a right secret", "client", secret, 200],
    ["a wrong secret", "client", "wrong-Sesame", 401],
    ["an expired secret", "expired", oldSecret, 401],
    ["an unknown client", "nobody", secret, 401],
    ["a client_id __proto__", "__proto__", secret, 401],
    ["a client without secrets", "keyed", secret, 401],
    ["a client with an empty list of secrets", "emptied", secret, 401],
  ];
  // Whoever measures how long an answer takes must not learn which of these it was.
  test.each(paths)("%s is hashed once and compared once", async (_, client_id, given, status) => {
    const calls: unknown[] = [];
    const { hash, timingSafeEqual, ...others } = { ...nodeCrypto };
    const counted = {
      hash: (...values: Parameters<typeof hash>) => {
        calls.push(["hash", ...values]);
        return hash(...values);
      },
      timingSafeEqual: (...values: Parameters<typeof timingSafeEqual>) => {
        calls.push(["timingSafeEqual", ...values.map(({ byteLength }) => byteLength)]);
        return timingSafeEqual(...values);
      },
    };
    mock.module("node:crypto", () => ({ ...others, ...counted }));
    try {
      for (const sent of [
        basic(`${client_id}:${given}`),
        asClient(client_id, { client_secret: given }),
      ]) {
        calls.length = 0;
        expect((await post(sent)).status).toBe(status);
        expect(calls).toEqual([
          ["hash", "sha256", given, "base64"],
          ["timingSafeEqual", 44, 44],
        ]);
      }
    } finally {
      mock.module("node:crypto", () => ({
        ...others,
        hash,
        timingSafeEqual,
      }));
    }
  });

  const sizes: [name: string, status: string, length: number][] = [
    ["of 16 KiB", "200", 16_384],
    ["a byte longer", "413", 16_385],
    ["of 1 MiB", "413", 1_048_576],
  ];
  test.each(sizes)("RFC 9110 §15.5.14 a body %s → %s", async (_, status, length) => {
    const { body } = build({});
    const filled = `${body}&x=`.padEnd(length, "x");
    expect(await postRaw({ body: filled })).toStartWith(`HTTP/1.1 ${status} `);
    if (status === "200") lines += 1;
    expect((await post({})).status).toBe(200);
  });

  test("RFC 9110 §15.5.14 a body in chunks, too long together → 413", async () => {
    const chunk = (text: string) => `${text.length.toString(16)}\r\n${text}\r\n`;
    const send = (text: string) => {
      const start = `POST /connect/token HTTP/1.1\r\nHost: ${host}\r\nConnection: close\r\n`;
      const head = `${start}Content-Type: ${formType}\r\nTransfer-Encoding: chunked\r\n\r\n`;
      return exchange(
        issuer,
        head +
          text
            .match(/.{1,999}/g)!
            .map(chunk)
            .join("") +
          chunk(""),
      );
    };
    lines += 2;
    const { body } = build({});
    expect(await send(`${body}&x=`.padEnd(16_000, "x"))).toStartWith("HTTP/1.1 200 OK\r\n");
    expect(await send(`${body}&x=`.padEnd(20_000, "x"))).toStartWith("HTTP/1.1 413 ");
  });

  test("what fails unexpectedly → 500 with a constant text, the cause in the log", async () => {
    const claims = { account: 12n };
    const { url } = await startIdp({ clients: [{ ...client, claims }] });
    const { status, headers, body, line } = await post({}, url);
    expect([status, headers]).toEqual([500, fields]);
    expect(body).toEqual({
      error: "server_error",
      error_description: "Internal Server Error",
    });
    await log.until(lines);
    const { event, error, reason } = log.requests[line]!;
    expect([event, error]).toEqual(["token refused", "server_error"]);
    expect(reason).toMatch(/BigInt/);
  });
});

// --- Signing keys that end -----------------------------------------------------------------------

describe("POST /connect/token and the signing keys", () => {
  let opened: Database;
  let started: Awaited<ReturnType<typeof startIdp>>;

  const health = async () => {
    const response = await fetch(`${started.origin}/health`);
    return [response.status, await response.text()];
  };

  beforeAll(async () => {
    const database = `${temporaryDirectory()}/keys.db`;
    started = await startIdp({ databaseUrl: `sqlite://${database}` });
    opened = new Database(database);
  });

  afterAll(() => opened.close());

  test("a token expires no later than its key is removed", async () => {
    const tokenAt = async (removed_at: number) => {
      opened.run("UPDATE signing_keys SET removed_at = ?", [removed_at]);
      await started.refresh();
      const { body } = await post({}, started.url);
      const { iat, exp } = jose.decodeJwt(`${body["access_token"]}`);
      return [iat, exp, body["expires_in"]];
    };
    const issued = await withinOneSecond(async (now) => ({
      now,
      tokens: [await tokenAt(now + 3599), await tokenAt(now + 3600), await tokenAt(now + 3601)],
    }));
    const { now } = issued;
    expect(issued.tokens).toEqual([
      [now, now + 3599, 3599],
      [now, now + 3600, 3600],
      [now, now + 3600, 3600],
    ]);
  });

  test("no key to sign with → 503 temporarily_unavailable with Retry-After, and it heals", async () => {
    expect(await health()).toEqual([200, '{"status":"ok"}']);
    opened.run("DELETE FROM signing_keys");
    opened.run(`CREATE TRIGGER no_key BEFORE INSERT ON signing_keys
      BEGIN SELECT RAISE(ABORT, 'no key'); END`);
    await expect(started.refresh()).rejects.toThrow("no key");
    expect(await health()).toEqual([503, '{"status":"unavailable"}']);
    const { status, headers, body, line } = await post({}, started.url);
    expect([status, headers]).toEqual([503, { ...fields, "retry-after": "5" }]);
    expect(body).toEqual({
      error: "temporarily_unavailable",
      error_description: "The server cannot answer this now. Try again soon.",
    });
    await log.until(lines);
    const { error, reason, client_id } = log.requests[line]!;
    expect([error, reason]).toEqual(["temporarily_unavailable", "no signing key"]);
    expect(client_id).toBe("client");

    opened.run("DROP TRIGGER no_key");
    await started.refresh();
    expect((await post({}, started.url)).status).toBe(200);
    expect(await health()).toEqual([200, '{"status":"degraded"}']);
  });
});

// --- Secrets on a public issuer ------------------------------------------------------------------

describe("a public issuer", () => {
  const publicIssuer = "https://auth.example";
  const shortSecret = longSecret.slice(1);
  const wideSecret = "ä".repeat(31);
  let made: string[];
  let origin: string;
  let url: string;

  beforeAll(async () => {
    const idp = launch("idp", { arguments: ["--new-secret"] });
    expect(await idp.ended()).toBe(0);
    expect(idp.stderr).toBe("");
    made = /^secret: (.*)\nsha256: (.*)\n$/.exec(idp.stdout)!.slice(1);
    const secrets = [longSecret, shortSecret, wideSecret].map((each) => secretOf(each));
    const registered = {
      ...client,
      client_secrets: [...secrets, { sha256: made[1]! }],
    };
    const { signingKeys } = authorizationServer;
    const settings = {
      issuer: publicIssuer,
      scopes: [...scopes.slice(1), { scope: "last", description: "Last", resource: myApi }],
      clients: [{ ...registered, scope: "read" }],
      acceptedAlgorithms: ["ES256", "PS512"],
      signingKeys: { ...signingKeys, maxAgeSeconds: 7 },
    };
    ({ origin, url } = await startIdp(settings));
  });

  const send = (client_secret: string) => post({ form: { client_secret } }, url);

  test("bun run secret prints 32 random bytes in base64url and the hash to paste", async () => {
    const [text = "", hashed] = made;
    expect(text).toMatch(/^[\w-]{43}$/);
    expect(Buffer.from(text, "base64url")).toHaveLength(32);
    expect(hashed).toBe(sha256(text));
    const again = launch("idp", { arguments: ["--new-secret"] });
    expect(await again.ended()).toBe(0);
    expect(again.stdout).not.toContain(text);
    expect((await send(text)).status).toBe(200);
  });

  test("RFC 6749 §2.3.1 a secret of 32 characters → 200", async () => {
    expect(longSecret).toHaveLength(32);
    const { status, body } = await send(longSecret);
    expect(status).toBe(200);
    expect(jose.decodeJwt(`${body["access_token"]}`).iss).toBe(publicIssuer);
    expect((await post(basic(`client:${longSecret}`), url)).status).toBe(200);
  });

  const tooShort: [name: string, deviation: Deviation][] = [
    ["in the form", { form: { client_secret: shortSecret } }],
    ["in Basic", basic(`client:${shortSecret}`)],
    ["of 62 bytes", { form: { client_secret: wideSecret } }],
    ["of an unknown client", { form: { client_id: "nobody", client_secret: shortSecret } }],
  ];
  const answered = new Map<string, Answer>();

  beforeAll(async () => {
    for (const [name, deviation] of tooShort) answered.set(name, await post(deviation, url));
    answered.set("wrong", await send(longSecret.toUpperCase()));
    await log.until(lines);
  });

  test.each(tooShort)(
    "RFC 6749 §2.3.1 a registered secret of 31 characters, %s → 401 invalid_client",
    (name) => {
      const { status, headers, text, line } = answered.get(name)!;
      const realm = `Basic realm="${publicIssuer}", charset="UTF-8"`;
      expect([status, headers]).toEqual([401, { ...fields, "www-authenticate": realm }]);
      expect(text).toBe(invalidClientText);
      expect(log.requests[line]!["reason"]).toBe("secret too short");
    },
  );

  test("RFC 6749 §5.2 a wrong secret of 32 characters → 401 invalid_client", () => {
    const { status, text, line } = answered.get("wrong")!;
    expect([status, text]).toEqual([401, invalidClientText]);
    expect(log.requests[line]!["reason"]).toBe(wrong);
  });

  test("RFC 8414 §2 metadata tells what is configured", async () => {
    const response = await fetch(`${origin}/.well-known/oauth-authorization-server`);
    expect(response.headers.get("cache-control")).toBe("public, max-age=7");
    expect(await response.json()).toEqual({
      issuer: publicIssuer,
      jwks_uri: `${publicIssuer}/.well-known/openid-configuration/jwks`,
      token_endpoint: `${publicIssuer}/connect/token`,
      scopes_supported: ["read", "write", "audit", "last"],
      response_types_supported: [],
      grant_types_supported: ["client_credentials"],
      token_endpoint_auth_methods_supported: [
        "client_secret_basic",
        "client_secret_post",
        "private_key_jwt",
      ],
      token_endpoint_auth_signing_alg_values_supported: ["ES256", "PS512"],
      dpop_signing_alg_values_supported: ["ES256", "PS512"],
      protected_resources: [orders, audit, myApi],
    });
  });
});

// --- Documents -----------------------------------------------------------------------------------

const wellKnown = "/.well-known/openid-configuration";
const documents = [wellKnown, "/.well-known/oauth-authorization-server", `${wellKnown}/jwks`];
const cacheable = {
  "cache-control": "public, max-age=60",
  "content-type": "application/json;charset=utf-8",
};

/** Answers by fetch, without what changes. */
async function get(path: string, method = "GET") {
  const response = await fetch(issuer + path, { method });
  const { date, ...headers } = response.headers.toJSON();
  return { status: response.status, headers, text: await response.text() };
}

describe("GET", () => {
  const algorithms = authorizationServer.acceptedAlgorithms;

  test.each(documents.slice(0, 2))("%s RFC 8414 §3.2 → 200, the exact metadata", async (path) => {
    const { status, headers, text } = await get(path);
    expect(status).toBe(200);
    expect(headers).toEqual({
      ...cacheable,
      "content-length": `${Buffer.byteLength(text)}`,
    });
    const document = {
      issuer,
      jwks_uri: `${issuer}/.well-known/openid-configuration/jwks`,
      token_endpoint: `${issuer}/connect/token`,
      scopes_supported: ["api1", "read", "write", "audit"],
      response_types_supported: [],
      grant_types_supported: ["client_credentials"],
      token_endpoint_auth_methods_supported: [
        "client_secret_basic",
        "client_secret_post",
        "private_key_jwt",
      ],
      token_endpoint_auth_signing_alg_values_supported: algorithms,
      dpop_signing_alg_values_supported: algorithms,
      protected_resources: [myApi, orders, audit],
    };
    expect(text).toBe(JSON.stringify(document));
  });

  test("RFC 8414 §2 what is advertised is there", async () => {
    const document = JSON.parse((await get(wellKnown)).text);
    const urls = Object.entries(document).filter(([name]) => /_(uri|endpoint)$/.test(name));
    expect(urls.map(([name]) => name)).toEqual(["jwks_uri", "token_endpoint"]);
    expect((await fetch(document.jwks_uri)).status).toBe(200);

    const methods: Record<string, () => Promise<Deviation>> = {
      client_secret_basic: async () => basic(`client:${secret}`),
      client_secret_post: async () => ({}),
      private_key_jwt: async () => ({
        form: {
          client_id: "keyed",
          client_secret: undefined,
          client_assertion_type: "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
          client_assertion: await signedJwt(
            { alg: "ES256" },
            {
              iss: "keyed",
              sub: "keyed",
              aud: issuer,
              exp: seconds() + 60,
              jti: "1",
            },
            privateKey,
          ),
        },
      }),
    };
    const advertised: string[] = document.token_endpoint_auth_methods_supported;
    expect(advertised).toEqual(Object.keys(methods));
    for (const method of advertised) {
      const sent = await methods[method]!();
      expect((await post(sent, document.token_endpoint)).status).toBe(200);
    }
    for (const grant_type of document.grant_types_supported) {
      expect((await post(ofGrant(grant_type))).status).toBe(200);
    }
    for (const scope of document.scopes_supported) {
      const { body } = await post(asClient("every", { scope }));
      expect(body["scope"]).toBe(scope);
    }
    for (const resource of document.protected_resources) {
      const { body } = await post(asClient("every", { resource }));
      expect(jose.decodeJwt(`${body["access_token"]}`).aud).toBe(resource);
    }
    // The algorithms are those that the tests of assertions and proofs go through.
    expect(document.token_endpoint_auth_signing_alg_values_supported).toEqual(algorithms);
  });

  test("/.well-known/openid-configuration/jwks RFC 7517 §5 → 200, the public keys", async () => {
    const { status, headers, text } = await get(`${wellKnown}/jwks`);
    expect(status).toBe(200);
    expect(headers).toEqual({
      ...cacheable,
      "content-length": `${text.length}`,
    });
    const { keys, ...others } = JSON.parse(text);
    expect(others).toEqual({});
    // The one that signs, and its successor.
    expect(keys).toHaveLength(2);
    for (const key of keys) {
      expect(Object.keys(key).toSorted()).toEqual(["alg", "crv", "kid", "kty", "use", "x", "y"]);
      expect(key).toMatchObject({
        kty: "EC",
        crv: "P-256",
        alg: "ES256",
        use: "sig",
      });
    }
  });

  test("/health → 200", async () => {
    const { status, headers, text } = await get("/health");
    expect(status).toBe(200);
    expect(headers).toEqual({ ...fields, "content-length": "15" });
    expect(text).toBe('{"status":"ok"}');
  });

  test.each([...documents, "/health"])("%s with a query → the same", async (path) => {
    expect(await get(`${path}?status=x&path=/connect/token`)).toEqual(await get(path));
  });

  test.each([...documents, "/health"])("HEAD %s RFC 9110 §9.3.2 → as GET", async (path) => {
    const { text, ...head } = await get(path, "HEAD");
    const { text: body, ...rest } = await get(path);
    expect(head).toEqual(rest);
    expect([text, body.length > 0]).toEqual(["", true]);
  });
});

// --- Everything else -----------------------------------------------------------------------------

const plain = { ...noStore, "content-type": "text/plain;charset=utf-8" };

describe("routes", () => {
  const others = ["PUT", "PATCH", "DELETE", "OPTIONS"];
  const notAllowed: [method: string, path: string, allow: string][] = [
    ...[...documents, "/health"].flatMap((path) =>
      ["POST", ...others].map((method): [string, string, string] => [method, path, "GET, HEAD"]),
    ),
    ...["GET", ...others].map((method): [string, string, string] => [
      method,
      "/connect/token",
      "POST",
    ]),
    ["GET", "/connect/token?grant_type=client_credentials&client_id=client", "POST"],
  ];
  test.each(notAllowed)("%s %s RFC 9110 §15.5.6 → 405, Allow: %s", async (method, path, allow) => {
    const { status, headers, text } = await get(path, method);
    expect(status).toBe(405);
    expect(headers).toEqual({ ...plain, allow, "content-length": "18" });
    expect(text).toBe("Method Not Allowed");
  });

  test("HEAD /connect/token RFC 9110 §15.5.6 → 405, Allow: POST", async () => {
    const { status, headers, text } = await get("/connect/token", "HEAD");
    expect(status).toBe(405);
    expect(headers).toMatchObject({ ...noStore, allow: "POST" });
    expect(text).toBe("");
  });

  const paths = [
    "/",
    "/connect",
    "/connect/token/",
    "/connect/tokens",
    "/Connect/Token",
    "/connect/%74oken",
    "/connect/token;x",
    "/connect/introspect",
    "/connect/authorize",
    "/health/",
    "/HEALTH",
    "/.well-known/",
    "/.well-known/openid-configuration/",
    "/.well-known/openid-configuration/jwks/",
    "/.well-known/oauth-authorization-server/connect",
    "/.well-known/oauth-protected-resource",
    "/keys/keys.db",
    "/idp.ts",
    "/__proto__",
    "/constructor",
    "/?/health",
    "/x?/connect/token",
  ];
  test.each(paths)("%s RFC 9110 §15.5.5 → 404", async (path) => {
    for (const method of ["GET", "POST", "DELETE"]) {
      const { status, headers, text } = await get(path, method);
      expect(status).toBe(404);
      expect(headers).toEqual({ ...plain, "content-length": "9" });
      expect(text).toBe("Not Found");
    }
    const head = await get(path, "HEAD");
    expect([head.status, head.text]).toEqual([404, ""]);
  });

  const end = `Host: ${host}\r\nConnection: close\r\n`;
  const hostOf = (name: string) => `Host: ${name}\r\nConnection: close\r\n`;
  const ok = "200 OK";
  const notFound = "404 Not Found";
  const badRequest = "400 Bad Request";
  const noSuchMethod = "405 Method Not Allowed";
  const targets: [name: string, status: string, line: string, fields: string][] = [
    ["§3.2.1 origin-form", ok, "GET /health HTTP/1.1", end],
    ["HTTP/1.0 without Host", ok, "GET /health HTTP/1.0", ""],
    ["HTTP/1.0 without Host, with a query", ok, "GET /health?x HTTP/1.0", ""],
    ["HTTP/1.0 without Host, an unknown path", notFound, "GET /x HTTP/1.0", ""],
    ["HTTP/1.0 with Host", ok, "GET /health HTTP/1.0", end],
    ["§3.2.2 absolute-form", ok, `GET ${issuer}/health HTTP/1.1`, end],
    ["§3.2.2 absolute-form, another host", ok, "GET http://x.example/health HTTP/1.1", end],
    ["§3.2.2 absolute-form, https", ok, "GET https://x.example/health?x HTTP/1.1", end],
    ["§3.2.2 absolute-form, an unknown path", notFound, `GET ${issuer}/x HTTP/1.1`, end],
    ["§3.2.2 absolute-form without a path", notFound, `GET ${issuer} HTTP/1.1`, end],
    ["§3.2.2 a URL in the path", notFound, `GET /${issuer}/health HTTP/1.1`, end],
    ["§3.2.2 a URL in the query", notFound, `GET /x?${issuer}/health HTTP/1.1`, end],
    ["§3.2.3 authority-form", notFound, "CONNECT x.example:443 HTTP/1.1", end],
    ["CONNECT with a path", noSuchMethod, "CONNECT /health HTTP/1.1", end],
    ["CONNECT with the token endpoint", noSuchMethod, "CONNECT /connect/token HTTP/1.1", end],
    ["TRACE", noSuchMethod, "TRACE /health HTTP/1.1", end],
    ["TRACE of the token endpoint", noSuchMethod, "TRACE /connect/token HTTP/1.1", end],
    ["§3.2.4 asterisk-form", badRequest, "OPTIONS * HTTP/1.1", end],
    ["GET with an asterisk", badRequest, "GET * HTTP/1.1", end],
    ["two slashes", notFound, "GET //health HTTP/1.1", end],
    ["two slashes, HTTP/1.0", notFound, "GET //health HTTP/1.0", ""],
    ["a fragment", ok, "GET /health#x HTTP/1.1", end],
    ["a fragment of an unknown path", notFound, "GET /x#/health HTTP/1.1", end],
    ["a backslash", notFound, "GET /\\health HTTP/1.1", end],
    ["a path of 10,000 characters", notFound, `GET /${"x".repeat(10_000)} HTTP/1.1`, end],
    ["HTTP/1.1 without Host", badRequest, "GET /health HTTP/1.1", ""],
    ["an empty Host", ok, "GET /health HTTP/1.1", hostOf("")],
    ["Host with a space", ok, "GET /health HTTP/1.1", hostOf("a b")],
    ["Host with a path", notFound, "GET /x HTTP/1.1", hostOf("x/health")],
    ["Host with a path and a query", notFound, "GET /x HTTP/1.1", hostOf("x/health?")],
    ["Host with a fragment", ok, "GET /health HTTP/1.1", hostOf("x#")],
    ["Host with a bracket", ok, "GET /health HTTP/1.1", hostOf("[")],
    ["Host with a user", ok, "GET /health HTTP/1.1", hostOf("a@b")],
    ["Host with a scheme", ok, "GET /health HTTP/1.1", hostOf("http://x")],
    ["Host with a port too high", ok, "GET /health HTTP/1.1", hostOf("x:99999")],
    ["Host of another server", ok, "GET /health HTTP/1.1", hostOf("x.example")],
  ];
  test.each(targets)("RFC 9112 %s → %s", async (_, status, line, more) => {
    const answer = await exchange(issuer, `${line}\r\n${more}\r\n`);
    expect(answer).toStartWith(`HTTP/1.1 ${status}\r\n`);
    const body = {
      "200": '{"status":"ok"}',
      "404": "Not Found",
      "405": "Method Not Allowed",
    };
    const expected = Object.entries(body).find(([code]) => status.startsWith(code))?.[1] ?? "";
    expect(answer).toEndWith(`\r\n\r\n${expected}`);
  });

  const starts: [name: string, start: string, headers: Record<string, string>][] = [
    ["HTTP/1.0", "POST /connect/token HTTP/1.0", {}],
    ["absolute-form", "POST http://x.example/connect/token HTTP/1.1", {}],
    ["Host of another server", "POST /connect/token HTTP/1.1", { host: "x.example" }],
    [
      "X-Forwarded-* of another server",
      "POST /connect/token HTTP/1.1",
      {
        "x-forwarded-host": "x.example",
        "x-forwarded-proto": "https",
        forwarded: "host=x",
      },
    ],
  ];
  test.each(starts)(
    "POST /connect/token RFC 9068 §2.2 %s → 200, iss as configured",
    async (_, start, headers) => {
      const answer = await postRaw({ headers }, "", start);
      lines += 1;
      expect(answer).toStartWith("HTTP/1.1 200 OK\r\n");
      const { access_token } = JSON.parse(answer.split("\r\n\r\n")[1]!);
      expect(jose.decodeJwt(access_token).iss).toBe(issuer);
    },
  );

  test("a document that fails unexpectedly → 500, without the cause", async () => {
    const cwd = temporaryDirectory();
    const origin = freeOrigin();
    await Bun.write(
      join(cwd, "broken.ts"),
      `import { authorizationServer } from ${JSON.stringify(join(root, "config.ts"))};
       Object.assign(authorizationServer, { scopes: [{ scope: 1n, resource: "https://api.example" }], clients: [] });`,
    );
    const command = [process.execPath, "--preload", "./broken.ts", join(root, "idp.ts")];
    const env = {
      PATH: process.env["PATH"],
      HOME: process.env["HOME"],
      ISSUER: origin,
    };
    const idp = new Program(command, { cwd, env });
    await idp.printed(/authorization server/);
    const response = await fetch(origin + wellKnown);
    expect(response.status).toBe(500);
    expect(await response.text()).not.toMatch(/BigInt|TypeError|idp\.ts| at |\//);
    expect((await fetch(`${origin}/health`)).status).toBe(200);
    await idp.printed(/BigInt/);
    await idp.stop();
  });

  test("while stopping /health is 503, and every answer carries Connection: close", async () => {
    const { origin } = await startIdp();
    const name = new URL(origin).host;
    const send = (start: string, body = "") => {
      const about = `Content-Type: ${formType}\r\nContent-Length: ${body.length}\r\n`;
      return exchange(origin, `${start} HTTP/1.1\r\nHost: ${name}\r\n${about}\r\n${body}`);
    };
    lifecycle.stopping = true; // and what else a signal does
    for (const fields of lifecycle.answers) fields.set("connection", "close");
    try {
      const unavailable = await send("GET /health");
      expect(unavailable).toStartWith("HTTP/1.1 503 Service Unavailable\r\n");
      expect(unavailable).toEndWith('\r\n\r\n{"status":"unavailable"}');
      const answered = [
        unavailable,
        ...(await Promise.all([
          send(`GET ${wellKnown}`),
          send(`GET ${wellKnown}/jwks`),
          send("POST /connect/token", `${build({}).body}`),
          send("POST /connect/token", "x=%"),
          send("GET /connect/token"),
          send("GET /nothing"),
        ])),
      ];
      lines += 2;
      for (const answer of answered) expect(answer).toMatch(/\r\nconnection: close\r\n/i);
      const statuses = answered.map((answer) => answer.slice(9, 12));
      expect(statuses).toEqual(["503", "200", "200", "200", "400", "405", "404"]);
    } finally {
      lifecycle.stopping = false;
      for (const fields of lifecycle.answers) fields.delete("connection");
    }
  });
});

// --- Log -----------------------------------------------------------------------------------------

describe("log", () => {
  const ids: [name: string, client_id: string][] = [
    ["a secret, in the wrong place", secret],
    [
      "a line break and a line of JSON",
      '\n{"event":"token issued","address":"","client_id":"x"}\n',
    ],
    ["quotation marks", '","event":"token issued","x":"'],
    ["10,000 characters", "z".repeat(10_000)],
  ];
  const sent = new Map<string, Answer[]>();

  beforeAll(async () => {
    for (const [name, client_id] of ids) {
      const inForm = await post({ form: { client_id } });
      const inBasic = await post(basic(`${encodeURIComponent(client_id)}:x`));
      sent.set(name, [inForm, inBasic]);
    }
    await log.until(lines);
  });

  test.each(ids)("unknown client_id, %s → one line, and nothing of it", (name) => {
    for (const { status, line } of sent.get(name)!) {
      const { time, milliseconds, ...entry } = log.requests[line]!;
      const address = "127.0.0.1";
      const said = { event: "token refused", address, error: "invalid_client", reason: unknown };
      expect([status, entry]).toEqual([401, said]);
    }
  });

  test("every request is one line, and every line is JSON", async () => {
    await log.until(lines);
    expect(log.requests).toHaveLength(lines);
    const written = log.text().split("\n").filter(Boolean);
    for (const line of written) expect(Object.keys(JSON.parse(line))[0]).toBe("time");
    expect(log.text()).not.toMatch(/[\x00-\x09\x0b-\x1f]/);
  });

  test("the client_id is logged as soon as it is that of a client, also in Basic", () => {
    const entryOf = (rule: string) => {
      const rows = refusals.flatMap(([, , , , each]) => each);
      const [, deviation] = rows.find(([name]) => name === rule)!;
      return log.requests[answers.get(deviation)!.line]!["client_id"];
    };
    expect(entryOf("§5.2 unknown client, in the form")).toBeUndefined();
    expect(entryOf("§5.2 unknown client, in Basic")).toBeUndefined();
    expect(entryOf("§5.2 client_id __proto__")).toBeUndefined();
    expect(entryOf("§5.2 wrong secret, in Basic")).toBe("client");
    expect(entryOf("§3.2.1 client_id alone")).toBe("client");
    expect(entryOf("§3.2.1 no credentials")).toBeUndefined();
    expect(entryOf("§3.2.1 Basic and another client_id")).toBe("client");
    expect(entryOf("§5.2 unknown grant_type")).toBe("client");
    expect(entryOf("§3.3 an unknown scope")).toBe("client");
    expect(entryOf("§3.2 scope twice")).toBeUndefined();
  });

  test("a long reason is cut at 2,000 characters", async () => {
    const name = "x".repeat(3_000);
    const assertion = await signedJwt(
      { alg: "ES256", crit: [name], [name]: 1 },
      {
        iss: "keyed",
        sub: "keyed",
        aud: issuer,
        exp: seconds() + 60,
        jti: "2",
      },
      privateKey,
    );
    const { status, line } = await post({
      form: {
        ...noCredentials,
        client_assertion_type: "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
        client_assertion: assertion,
      },
    });
    expect(status).toBe(401);
    await log.until(lines);
    const reason = `Extension Header Parameter "${name}`.slice(0, 2_000);
    expect(log.requests[line]!["reason"]).toBe(reason);
  });

  test("no secret, credential or token is in it", async () => {
    await log.until(lines);
    const text = log.text();
    const secrets = [secret, oddSecret, oldSecret, nextSecret, longSecret, "one:two:three"];
    const shown = [...secrets, "before-Last-Word", "wrong-Sesame"].flatMap((each) => {
      return [each, encodeURIComponent(each), base64(each), sha256(each)];
    });
    for (const [deviation, { body }] of answers) {
      const headers: Record<string, string> = build(deviation).headers;
      const credentials = headers["authorization"]?.split(" ")[1] ?? "";
      if (credentials.length > 8) shown.push(credentials);
      if (body["access_token"]) shown.push(...`${body["access_token"]}`.split("."));
    }
    expect(shown.length).toBeGreaterThan(100);
    expect(shown.filter((each) => text.includes(each))).toEqual([]);
  });
});
