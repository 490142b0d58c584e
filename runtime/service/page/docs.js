// Show the OpenAPI document: the parameters, bodies and responses of every operation.

import { element } from "./dom.js";

const root = document.querySelector("main");

function resolve(document, schema) {
  return schema?.$ref ? schema.$ref.slice(2).split("/").reduce((at, part) => at[part], document) : schema ?? {};
}

/** Describe a schema in a few words: "text, up to 500 characters", "list of Grounded". */
function words(document, schema) {
  const name = schema.$ref?.split("/").pop();
  if (name) return name;
  if (schema.anyOf) return schema.anyOf.filter((one) => one.type !== "null").map((one) => words(document, one)).join(", or ");
  if (schema.enum) return schema.enum.join(", ");
  if (schema.type === "array") return `list ${schema.maxItems ? `of up to ${schema.maxItems}: ` : "of "}${words(document, schema.items)}`;
  const kinds = { string: schema.format === "binary" ? "file" : "text", integer: "whole number", number: "number" };
  const bounds = [
    schema.maxLength && `up to ${schema.maxLength} characters`,
    schema.minimum !== undefined && `at least ${schema.minimum}`,
    schema.exclusiveMinimum !== undefined && `above ${schema.exclusiveMinimum}`,
    schema.maximum !== undefined && `at most ${schema.maximum}`,
  ].filter(Boolean);
  return [kinds[schema.type] ?? schema.type ?? "anything", ...bounds].join(", ");
}

function table(document, rows) {
  return element(
    "table",
    "",
    ...rows.map(([name, schema, required, about]) =>
      element(
        "tr",
        "",
        element("td", "", element("code", "", name), required ? " (required)" : ""),
        element("td", "", words(document, schema)),
        element("td", "quiet", about ?? schema.description ?? ""),
      ),
    ),
  );
}

function fields(document, schema) {
  const target = resolve(document, schema.type === "array" ? schema.items : schema);
  const required = new Set(target.required ?? []);
  return Object.entries(target.properties ?? {}).map(([name, field]) => [name, field, required.has(name)]);
}

function operation(document, path, method, about) {
  const made = element("article", "", element("h2", "", element("b", "", method.toUpperCase()), element("code", "", path)));
  made.append(element("p", "", about.description ?? ""));
  const parameters = (about.parameters ?? []).map((one) => [one.name, one.schema, one.required, one.description]);
  if (parameters.length) made.append(element("h3", "", "Parameters"), table(document, parameters));
  for (const [kind, { schema }] of Object.entries(about.requestBody?.content ?? {})) {
    made.append(element("h3", "", `Body: ${kind}`), table(document, fields(document, schema)));
  }
  for (const [status, answer] of Object.entries(about.responses)) {
    if (!status.startsWith("2")) continue;
    const [kind, content] = Object.entries(answer.content ?? {})[0] ?? ["nothing", {}];
    made.append(element("h3", "", `Response ${status}: ${kind}${content.schema?.type === "array" ? ", a list of" : ""}`));
    if (content.schema) made.append(table(document, fields(document, content.schema)));
  }
  return made;
}

const document_ = await (await fetch("/openapi.json")).json();
root.append(element("p", "", document_.info.summary));
for (const [path, methods] of Object.entries(document_.paths)) {
  for (const [method, about] of Object.entries(methods)) root.append(operation(document_, path, method, about));
}
const failure = document_.components.schemas.Problem;
root.append(
  element(
    "article",
    "",
    element("h2", "", "Errors"),
    element("p", "", "Every error has a JSON body: {\"error\": {\"code\": …, \"message\": …}}."),
    table(document_, fields(document_, failure)),
  ),
);
