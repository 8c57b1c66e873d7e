// What asv's page asks of servers and of plugins that no package has: see asv_site.py.
"use strict";

// requests are answered from window.asvFiles: browsers refuse those for files on disk. What is no
// data is asked for to see whether a server lives
jQuery.ajaxTransport("+*", (options) => {
  const name = decodeURIComponent(options.url.split("?")[0]), json = window.asvFiles[name];
  const answer = name.endsWith(".json") && json === undefined
    ? [404, "Not Found"] : [200, "OK", json === undefined ? { text: "" } : { json }];
  // later, as from a server: asv registers its pages after it has asked for the first file
  return { send: (headers, done) => setTimeout(() => done(...answer)), abort: () => {} };
});

// asv closes tags as <b/>, which jQuery takes for open ones from 3.5 on
jQuery.htmlPrefilter = (html) =>
  html.replace(/<(?!br|hr|img|input)([a-z]+)([^<>]*)\/>/g, "<$1$2></$1>");

// tables sorted by a click on a header: the part of stupidtable's interface that asv uses
jQuery.fn.stupidtable = function (orders) {
  const known = {
    string: (a, b) => a.localeCompare(b),
    float: (a, b) => parseFloat(a) - parseFloat(b),
    ...orders,
  };
  this.data("orders", known);
  return this.on("click", "th[data-sort]", (event) => {
    const header = jQuery(event.currentTarget);
    header.stupidsort(header.data("direction") === "asc" ? "desc" : "asc");
  });
};

jQuery.fn.stupidsort = function (direction) {
  const table = this.closest("table"), column = this.index(), body = table.children("tbody");
  const order = (table.data("orders") || {})[this.data("sort")];
  if (!order) return this;
  const value = (row) => {
    const cell = jQuery(row).children().eq(column), given = cell.attr("data-sort-value");
    return given === undefined ? cell.text() : given;
  };
  const sign = direction === "desc" ? -1 : 1, rows = body.children("tr").get();
  body.append(rows.sort((a, b) => sign * order(value(a), value(b))));
  this.data("direction", direction);
  table.trigger("aftertablesort", { column, direction });
  return this;
};

// bars of several series beside each other
jQuery.plot.plugins.push({
  name: "bars beside each other",
  version: "1",
  options: {},
  init: (plot) => plot.hooks.processDatapoints.push((_, series, datapoints) => {
    if (!series.bars.show) return;
    const all = plot.getData(), place = all.indexOf(series) - (all.length - 1) / 2;
    for (let i = 0; i < datapoints.points.length; i += datapoints.pointsize) {
      if (datapoints.points[i] !== null) datapoints.points[i] += place * series.bars.barWidth;
    }
  }),
});

// asv keeps what a reader ignores under a digest of its name; the name itself serves as well
window.md5 = (text) => text;
