/** Keys, tokens, assertions and proofs as a client or another issuer makes them, and an issuer. */

import * as jose from "jose";

export interface Key {
  alg: string;
  privateKey: jose.CryptoKey;
  privateJwk: jose.JWK;
  publicJwk: jose.JWK;
}

/** A key pair; its public JWK has `kid` and `alg`. */
export async function key(alg = "ES256", kid: string = crypto.randomUUID()): Promise<Key> {
  const { privateKey, publicKey } = await jose.generateKeyPair(alg, { extractable: true });
  const publicJwk = { ...(await jose.exportJWK(publicKey)), kid, alg };
  const privateJwk = { ...(await jose.exportJWK(privateKey)), kid, alg };
  return { alg, privateKey, privateJwk, publicJwk };
}

export const secondsNow = () => Math.floor(Date.now() / 1000);

/** Members that are undefined are left out, so that a row can take one away. */
export async function sign(
  signer: Key,
  claims: Record<string, unknown>,
  header: Record<string, unknown> = {},
): Promise<string> {
  const protectedHeader = { alg: signer.alg, ...header };
  const payload = new TextEncoder().encode(JSON.stringify(claims));
  const jws = new jose.CompactSign(payload).setProtectedHeader(protectedHeader as never);
  return await jws.sign(signer.privateKey, { crit: { b64: true, exp: true } as never });
}

/** A JWT with these claims, signed with a text as if that were a secret. */
export async function signSymmetric(
  secret: string,
  claims: jose.JWTPayload,
  header: Record<string, unknown> = {},
): Promise<string> {
  const jwt = new jose.SignJWT(claims).setProtectedHeader({ alg: "HS256", ...header });
  return await jwt.sign(new TextEncoder().encode(secret));
}

/** An access token as RFC 9068 §2 has it, but for `changes`. */
export async function accessToken(
  signer: Key,
  iss: string,
  aud: unknown,
  changes: Record<string, unknown> = {},
  header: Record<string, unknown> = {},
): Promise<string> {
  const iat = secondsNow();
  const subject = { sub: "client", client_id: "client", scope: "api1", jti: crypto.randomUUID() };
  const claims = { iss, aud, ...subject, iat, exp: iat + 600, ...changes };
  return await sign(signer, claims, { typ: "at+jwt", kid: signer.publicJwk.kid, ...header });
}

/** A client assertion as RFC 7523 §3 has it, but for `changes`. */
export async function assertion(
  signer: Key,
  client_id: string,
  aud: unknown,
  changes: Record<string, unknown> = {},
  header: Record<string, unknown> = {},
): Promise<string> {
  const iat = secondsNow();
  const ids = { iss: client_id, sub: client_id, aud, jti: crypto.randomUUID() };
  const claims = { ...ids, iat, exp: iat + 60, ...changes };
  const typ = "client-authentication+jwt";
  return await sign(signer, claims, { typ, kid: signer.publicJwk.kid, ...header });
}

export const assertionType = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";

/** A DPoP proof as RFC 9449 §4.2 has it, but for `changes`. With a token it has its `ath`. */
export async function proof(
  signer: Key,
  htm: string,
  htu: string,
  token?: string,
  changes: Record<string, unknown> = {},
  header: Record<string, unknown> = {},
): Promise<string> {
  const { kid: _kid, alg, ...members } = signer.publicJwk;
  // A key of kty AKP (ML-DSA) is for the algorithm that it names, so its JWK must name one.
  const jwk = members.kty === "AKP" ? { ...members, alg } : members;
  const ath = token && new Bun.CryptoHasher("sha256").update(token).digest("base64url");
  const claims = { htm, htu, jti: crypto.randomUUID(), iat: secondsNow(), ath, ...changes };
  return await sign(signer, claims, { typ: "dpop+jwt", jwk, ...header });
}

/** An issuer that a test plays: its metadata and its keys are what the test makes of them. */
export class Issuer {
  metadata: unknown;
  jwks: unknown;
  /** Answers instead of the documents, if it is set. */
  answer: ((request: Request) => Response | Promise<Response | undefined> | undefined) | undefined;
  /** The paths that were asked for. */
  readonly requests: string[] = [];
  readonly server: Bun.Server<undefined>;
  readonly url: string;

  constructor(keys: Key[], path = "") {
    this.server = Bun.serve({
      hostname: "127.0.0.1",
      port: 0,
      fetch: async (request) => {
        const { pathname } = new URL(request.url);
        this.requests.push(pathname);
        const answer = await this.answer?.(request);
        if (answer) return answer;
        if (pathname.endsWith("/openid-configuration")) return Response.json(this.metadata);
        if (pathname.endsWith("/jwks")) return Response.json(this.jwks);
        return new Response("Not Found", { status: 404 });
      },
    });
    const origin = `http://127.0.0.1:${this.server.port}`;
    this.url = origin + path;
    const token_endpoint = `${origin}/token`;
    this.metadata = { issuer: this.url, jwks_uri: `${origin}/jwks`, token_endpoint };
    this.publish(...keys.map(({ publicJwk }) => publicJwk));
  }

  /** From now on these are its keys: JWKs, or what a test puts in their place. */
  publish(...keys: unknown[]): void {
    this.jwks = { keys };
  }
}
