/**
 * How a client authenticates with a secret (RFC 6749 §2.3.1): in Basic or in the form, by one way
 * at a time. Whatever is wrong with it, the answer is the same, and only the log has the reason.
 */

import { describe, expect, test } from "bun:test";
import { authorizationServer, type ClientRegistration } from "../../config.ts";
import { basic, fieldsOf, form, post, raw, refusalOf } from "../support/http.ts";
import { assertionType, key } from "../support/jwt.ts";
import { launch } from "../support/programs.ts";
import { idp as startIdp } from "../support/servers.ts";

const now = 1_800_000_000;
const clock = () => now * 1000;

const stored = (text: string, expires_at?: number) => ({
  sha256: new Bun.CryptoHasher("sha256").update(text).digest("base64"),
  ...(expires_at !== undefined && { expires_at }),
});

const secret = "0pen-Sesame";
const oddId = "käfer & söhne:1";
const oddSecret = "grün+rot 100%:=&";
const keyed = await key();

const [client] = authorizationServer.clients;
const registration = (client_id: string, ...client_secrets: ReturnType<typeof stored>[]) => {
  return { ...client!, client_id, client_secrets };
};
const clients: ClientRegistration[] = [
  registration("client", stored(secret), stored("")),
  registration("several", stored("1st word"), stored("2nd word", now + 1), stored("3rd word", now)),
  registration("renewed", stored("same", now), stored("same"), stored("same", now)),
  registration(oddId, stored(oddSecret)),
  registration("colon", stored("one:two=three")),
  registration("space", stored(`${secret} `)),
  registration("plus", stored("a+b")),
  registration("percent", stored("100%")),
  registration("weak", stored("x")),
  { ...registration("keyed"), jwks: { keys: [keyed.publicJwk] } },
];

const idp = await startIdp({ clients, clock });

/** What proves who the client is: parameters of the form, or an Authorization field. */
type Credentials = { authorization?: string; parameters?: string };

const grant = "grant_type=client_credentials";
const ask = ({ authorization, parameters = "" }: Credentials, endpoint = idp.tokenEndpoint) =>
  post(endpoint, `${grant}&${parameters}`, authorization === undefined ? {} : { authorization });

/** In the form, form-encoded. */
const inForm = (client_id: string, client_secret: string) =>
  only(new URLSearchParams({ client_id, client_secret }).toString());
/** In Basic, as it is. */
const inBasic = (id: string, client_secret: string) => field(basic(id, client_secret));
const only = (parameters: string): Credentials => ({ parameters });
const field = (authorization: string): Credentials => ({ authorization });
const both = (authorization: string, parameters: string) => ({ authorization, parameters });
const base64 = (text: string | Uint8Array) => Buffer.from(text).toString("base64");
const encodedOdd = "k%C3%A4fer+%26+s%c3%b6hne%3A1";
const right = basic("client", secret);

// --- Accepted ------------------------------------------------------------------------------------

const accepted: [rule: string, credentials: Credentials][] = [
  ["RFC 6749 §2.3.1 client_secret_basic", inBasic("client", secret)],
  ["RFC 6749 §2.3.1 client_secret_post", inForm("client", secret)],
  ["RFC 9110 §11.1 the scheme in small letters", field(right.replace("Basic", "basic"))],
  ["RFC 9110 §11.1 the scheme in capitals", field(right.replace("Basic", "BASIC"))],
  ["RFC 9110 §11.4 several spaces", field(right.replace(" ", "   "))],
  ["RFC 6749 §2.3.1 Basic, form-encoded", inBasic(encodedOdd, "gr%C3%BCn%2Brot+100%25%3A%3D%26")],
  ["RFC 6749 §2.3.1 Basic, a space as %20", inBasic(encodedOdd, "gr%C3%BCn%2Brot%20100%25:=&")],
  ["RFC 7617 §2.1 Basic, UTF-8 as it is", inBasic("käfer+&+söhne%3A1", "grün%2Brot+100%25:=&")],
  ["RFC 7617 §2 Basic, a colon in the secret", inBasic("colon", "one:two=three")],
  ["RFC 6749 §2.3.1 Basic, + form-encoded", inBasic("plus", "a%2Bb")],
  ["RFC 6749 Appendix B post, odd characters", inForm(oddId, oddSecret)],
  ["RFC 6749 Appendix B post, = as it is", only("client_id=colon&client_secret=one:two=three")],
  ["RFC 6749 §2.3.1 post, a space at the end", inForm("space", `${secret} `)],
  ["RFC 6749 §3.2.1 Basic and the same client_id", both(right, "client_id=client")],
  ["RFC 6749 §3.2 Basic and empty parameters", both(right, "client_id=&client_secret=")],
  ["RFC 6749 §2.3.1 a weak secret, with a loopback issuer", inForm("weak", "x")],
  ["RFC 6749 §2.3.1 the first of several secrets", inForm("several", "1st word")],
  ["RFC 6749 §2.3.1 another, a second before it expires", inForm("several", "2nd word")],
  ["RFC 6749 §2.3.1 a secret that expired and was registered anew", inForm("renewed", "same")],
];

for (const [rule, credentials] of accepted)
  test(`POST /connect/token, ${rule} → 200`, async () =>
    expect((await ask(credentials)).status).toBe(200));

// --- Not authenticated ---------------------------------------------------------------------------

const part = (value: object) => Buffer.from(JSON.stringify(value)).toString("base64url");
const unsigned = (header: object, sub: string) =>
  `client_assertion_type=${assertionType}&client_assertion=${part(header)}.${part({ sub })}.x`;
const ofNobody = unsigned({ alg: "ES256" }, "nobody");

/** The log has a word that tells an operator why, and the registered client that was named. */
type Refused = [rule: string, credentials: Credentials, reason?: RegExp, client_id?: string];
const notAuthenticated: Refused[] = [
  ["RFC 6749 §3.2.1 no credentials", {}, /no credentials/],
  ["RFC 6749 §3.2.1 client_id alone", only("client_id=client")],
  ["RFC 6749 §3.2 client_id and an empty secret", inForm("client", "")],
  ["RFC 6749 §3.2.1 client_secret alone", only(`client_secret=${secret}`), /unknown/],
  ["RFC 6749 §5.2 unknown client, in the form", inForm("nobody", secret), /unknown/],
  ["RFC 6749 §5.2 unknown client, in Basic", inBasic("nobody", secret), /unknown/],
  ["RFC 6749 §5.2 unknown client, a raw +", inBasic("nobody", "a+b"), /unknown/],
  ["RFC 6749 §5.2 client_id in capitals", inForm("CLIENT", secret), /unknown/],
  ["RFC 6749 §5.2 client_id with a space", inForm("client ", secret), /unknown/],
  ["RFC 6749 §5.2 client_id __proto__", inForm("__proto__", secret), /unknown/],
  ["RFC 6749 §5.2 wrong secret, in the form", inForm("client", "wrong"), /wrong/, "client"],
  ["RFC 6749 §5.2 wrong secret, in Basic", inBasic("client", "wrong"), /wrong/, "client"],
  ["RFC 6749 §5.2 secret with a space", inForm("client", `${secret} `), /wrong/, "client"],
  ["RFC 6749 §5.2 its beginning", inForm("client", secret.slice(0, -1)), /wrong/, "client"],
  ["RFC 6749 §5.2 its hash", inForm("client", stored(secret).sha256), /wrong/, "client"],
  ["RFC 6749 §5.2 the secret of another", inForm("client", "1st word"), /wrong/, "client"],
  ["RFC 6749 §5.2 none of several secrets", inForm("several", secret), /wrong/, "several"],
  ["RFC 6749 §5.2 an expired secret", inForm("several", "3rd word"), /expired/, "several"],
  ["RFC 6749 §5.2 a client with keys alone", inForm("keyed", secret), /wrong/, "keyed"],
  ["RFC 6749 §5.2 44 spaces, for a hash", inForm("keyed", " ".repeat(44)), /wrong/, "keyed"],
  ["RFC 6749 §5.2 Bearer alone", field("Bearer token"), /Authorization/],
  ["RFC 6749 §5.2 Digest alone", field('Digest username="a", qop=auth, nc=00000001')],
  ["RFC 6749 §5.2 Digest alone, a quoted comma", field('Digest username="a, b c", realm="x"')],
  ["RFC 6749 §5.2 a scheme that ends in Basic", field(`X${right}`)],
  ["RFC 7617 §2 Basic alone", field("Basic"), /Authorization/],
  ["RFC 7617 §2 Basic without a space", field(right.replace(" ", ""))],
  ["RFC 7617 §2 something after the credentials", field(`${right} x`)],
  ["RFC 7617 §2 Basic that is not base64", field(`Basic client:${secret}`), /base64/],
  ["RFC 7617 §2 Basic in base64url", field("Basic Y2xp_W50-A=="), /base64/],
  ["RFC 7617 §2 no colon", field(`Basic ${base64("client")}`), /Basic/],
  ["RFC 7617 §2 the colon percent-encoded", field(`Basic ${base64(`client%3A${secret}`)}`)],
  ["RFC 7617 §2 an empty secret", inBasic("client", "")],
  ["RFC 7617 §2 an empty client_id", inBasic("", secret)],
  ["RFC 7617 §2 a NUL", inBasic("client\0", secret)],
  ["RFC 7617 §2.1 Latin-1", field(`Basic ${base64(Buffer.from("käfer:x", "latin1"))}`), /utf-8/i],
  ["RFC 7617 §2.1 a byte order mark", inBasic("\uFEFFclient", secret)],
  ["RFC 6749 §2.3.1 a percent-encoded NUL", inBasic("client", `${secret}%00`)],
  ["RFC 6749 §2.3.1 + as it is", inBasic("plus", "a+b"), /form-encoded/, "plus"],
  ["RFC 6749 §2.3.1 % as it is", inBasic("percent", "100%"), /form-encoded/, "percent"],
  ["RFC 6749 §2.3.1 wrong, + as it is", inBasic("plus", "b+a"), /wrong/, "plus"],
  ["RFC 6749 §2.3.1 wrong, % as it is", inBasic("percent", "99%"), /wrong/, "percent"],
  ["RFC 6749 §2.3.1 malformed percent-encoding of the id", inBasic("cl%i", secret), /Basic/],
  ["RFC 6749 §2.3.1 percent-encoded bytes that are not UTF-8", inBasic("client", "%FF")],
  ["RFC 7617 §2 malformed Basic and client_id", both("Basic", "client_id=client")],
  ["RFC 7523 §3 an assertion of an unknown client", only(ofNobody), /unknown/],
  ["RFC 7523 §2.2 half an assertion", only(`client_assertion_type=${assertionType}`)],
];

const challenge = `Basic realm="${idp.url}", charset="UTF-8"`;
/** The answer to all of them. */
const same = await ask({});

for (const [rule, credentials, word = /^/, client_id] of notAuthenticated)
  test(`POST /connect/token, ${rule} → 401 invalid_client, as every other`, async () => {
    const answer = await ask(credentials);
    expect(refusalOf(answer)).toBe("401 invalid_client");
    expect(answer.headers.get("www-authenticate")).toBe(challenge);
    expect([answer.text, fieldsOf(answer)]).toEqual([same.text, fieldsOf(same)]);
    // The caller learns no more than who has the reason.
    expect(answer.json.error_description).toMatch(/\blog\b/);
    const line = idp.lines.at(-1)!;
    expect([line.event, line["reason"]]).toEqual(["token refused", expect.stringMatching(word)]);
    expect(line["reason"]).toMatch(/^[A-Z].{10,}\.$/);
    if (client_id || word.source === "unknown") expect(line["client_id"]).toBe(client_id);
  });

test("POST /connect/token, RFC 6749 §2.3.1 credentials in the query → 401 invalid_client", async () => {
  const endpoint = `${idp.tokenEndpoint}?client_id=client&client_secret=${secret}`;
  for (const credentials of [{}, only("client_id=client")])
    expect(refusalOf(await ask(credentials, endpoint))).toBe("401 invalid_client");
});

// --- In two ways at once -------------------------------------------------------------------------

const inPost = `client_id=client&client_secret=${secret}`;
const wrong = basic("client", "wrong");
const unknown = basic("nobody", "x");

const contradicting: Refused[] = [
  ["RFC 6749 §2.3 Basic and client_secret", both(right, inPost), /more than one/],
  ["RFC 6749 §2.3 Bearer and client_secret", both("Bearer token", inPost)],
  ["RFC 6749 §2.3 a scheme alone and client_secret", both("x", inPost)],
  ["RFC 6749 §2.3 malformed Basic and client_secret", both("Basic", inPost)],
  ["RFC 6749 §2.3 an empty Authorization field and client_secret", both("", inPost)],
  ["RFC 6749 §2.3 Basic and an assertion", both(right, "client_assertion=x")],
  ["RFC 6749 §2.3 Basic and the type of an assertion", both(right, "client_assertion_type=x")],
  ["RFC 6749 §2.3 client_secret, an assertion", only(`${inPost}&client_assertion=x`)],
  ["RFC 6749 §2.3 two ways of an unknown client", both("x", "client_id=nobody&client_secret=x")],
  ["RFC 6749 §3.2.1 Basic and another client_id", both(right, "client_id=plus"), /differ/],
  ["RFC 6749 §3.2.1 Basic and client_id in capitals", both(right, "client_id=CLIENT")],
  ["RFC 6749 §3.2.1 a wrong secret and another client_id", both(wrong, "client_id=plus")],
  ["RFC 6749 §3.2.1 an unknown client and client_id", both(unknown, "client_id=client")],
];

for (const [rule, credentials, word = /^/] of contradicting)
  test(`POST /connect/token, ${rule} → 400 invalid_request`, async () => {
    expect(refusalOf(await ask(credentials))).toBe("400 invalid_request");
    expect(idp.lines.at(-1)!["reason"]).toMatch(/^[A-Z].{10,}\.$/);
    expect(idp.lines.at(-1)!["reason"]).toMatch(word);
  });

const twoFields: [name: string, one: string, two: string][] = [
  ["Basic, then Bearer", right, "Bearer token"],
  ["Bearer, then Basic", "Bearer token", right],
  ["Basic, then a scheme alone", right, "Negotiate"],
  ["an empty one, then Basic", "", right],
  ["Basic, then a scheme of odd letters", right, "!#$%&'*+-.^_`|~1aZ x"],
  ["Digest, then Basic", 'Digest username="a, b c", realm="x"', right],
];

for (const [name, one, two] of twoFields)
  test(`POST /connect/token, RFC 6749 §2.3 two Authorization fields, ${name} → 400 invalid_request`, async () => {
    const fields = `Host: x\r\nConnection: close\r\nAuthorization: ${one}\r\nAuthorization: ${two}`;
    const head = `POST /connect/token HTTP/1.1\r\n${fields}\r\nContent-Type: ${form}`;
    const answer = await raw(idp.url, `${head}\r\nContent-Length: ${grant.length}\r\n\r\n${grant}`);
    expect(answer).toStartWith("HTTP/1.1 400 ");
    expect(answer).toContain('"invalid_request"');
    expect(answer.toLowerCase()).not.toContain("www-authenticate");
  });

// --- A public issuer -----------------------------------------------------------------------------

describe("a public issuer", async () => {
  const long = "exactly+thirty-two-characters%ok";
  const wide = "ä".repeat(31);
  const issuer = "https://auth.example.com";
  const programs = [1, 2].map(() => launch("idp", { arguments: ["--new-secret"] }));
  const codes = await Promise.all(programs.map((program) => program.ended()));
  const printed = /^secret: (.*)\nsha256: (.*)\n$/;
  const made = programs.map(({ stdout }) => printed.exec(stdout)?.slice(1) ?? []);
  const secrets = [long, long.slice(1), wide].map((text) => stored(text));
  const clients = [registration("client", ...secrets, { sha256: made[0]![1]! })];
  const server = await startIdp({ issuer, listen: "127.0.0.1:0", clients, clock });
  const endpoint = `http://127.0.0.1:${server.server.port}/connect/token`;

  test("bun run secret → 32 random bytes in base64url, and the hash for the registration", async () => {
    expect(codes).toEqual([0, 0]);
    for (const [text, sha256] of made) {
      expect(text).toMatch(/^[\w-]{43}$/);
      expect(sha256).toBe(stored(text!).sha256);
    }
    expect(made[0]).not.toEqual(made[1]!);
    expect((await ask(inBasic("client", made[0]![0]!), endpoint)).status).toBe(200);
  });

  test("POST /connect/token, RFC 6749 §2.3.1 a secret of 32 characters → 200", async () => {
    expect((await ask(inForm("client", long), endpoint)).status).toBe(200);
    expect((await ask(inBasic("client", encodeURIComponent(long)), endpoint)).status).toBe(200);
  });

  const short = long.slice(1);
  const refused: [rule: string, credentials: Credentials, reason: RegExp][] = [
    ["a right one of 31 characters, post", inForm("client", short), /32/],
    ["the same, in Basic", inBasic("client", encodeURIComponent(short)), /32/],
    ["a right one of 62 bytes and 31 characters", inForm("client", wide), /32/],
    ["a short one of an unknown client", inForm("nobody", "x"), /32/],
    ["a wrong one of 32 characters", inForm("client", long.toUpperCase()), /wrong/],
    ["a right one, not form-encoded in Basic", inBasic("client", long), /form-encoded/],
  ];
  for (const [rule, credentials, reason] of refused)
    test(`POST /connect/token, RFC 6749 §2.3.1 ${rule} → 401 invalid_client`, async () => {
      const answer = await ask(credentials, endpoint);
      expect(refusalOf(answer)).toBe("401 invalid_client");
      expect(answer.text).toBe(same.text);
      const realm = `Basic realm="${issuer}", charset="UTF-8"`;
      expect(answer.headers.get("www-authenticate")).toBe(realm);
      expect(server.lines.at(-1)!["reason"]).toMatch(reason);
    });
});

// --- The log -------------------------------------------------------------------------------------

test("log: an unknown client_id, which may be a secret or a forged line → nothing of it", async () => {
  for (const id of [secret, '\n{"event":"token issued"}\n', '","event":"token issued","x":"']) {
    for (const credentials of [inForm(id, "x"), inBasic(encodeURIComponent(id), "x")]) {
      const before = idp.lines.length;
      await ask(credentials);
      expect(idp.lines).toHaveLength(before + 1);
      const { time, milliseconds, reason, ...said } = idp.lines.at(-1)!;
      const who = { event: "token refused", address: "127.0.0.1" };
      expect(said).toEqual({ ...who, error: "invalid_client" });
      expect(reason).not.toContain(id);
    }
  }
});

test("log: a reason is cut at 2,000 characters", async () => {
  // An assertion with a crit header (RFC 7515 §4.1.11) that the reason repeats.
  const name = "x".repeat(3_000);
  const parameters = unsigned({ alg: "ES256", crit: [name], [name]: 1 }, "keyed");
  expect(refusalOf(await ask({ parameters }))).toBe("401 invalid_client");
  expect(idp.lines.at(-1)!["reason"]).toHaveLength(2_000);
});

test("log: no secret, no credentials and no token in any form", async () => {
  const tokens: string[] = [];
  for (const [, credentials] of [...accepted, ...notAuthenticated, ...contradicting]) {
    const { json } = await ask(credentials);
    if (json.access_token) tokens.push(...json.access_token.split("."));
  }
  const secrets = [secret, oddSecret, "one:two=three", "a+b", "100%", "2nd word", "3rd word"];
  const shown = secrets.flatMap((text) => [text, encodeURIComponent(text), base64(text)]);
  const hashes = secrets.map((text) => stored(text).sha256);
  const log = JSON.stringify(idp.lines);
  const all = [...shown, ...hashes, ...tokens, right];
  expect(all.filter((text) => log.includes(text))).toEqual([]);
  expect(tokens).toHaveLength(3 * accepted.length);
});
