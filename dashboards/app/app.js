// The theme of the address, before anything is drawn; and figures as images, drawn by the browser.
window.mooncakeTheme = (search) => {
  const theme = new URLSearchParams(search).get("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  return "";
};
window.mooncakeTheme(window.location.search);

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-image]");
  if (!button) return;
  const frame = button.closest("[data-figure]");
  const plot = frame.querySelector(".js-plotly-plot");
  const title = frame.querySelector("h4").textContent;
  const layout = {
    ...plot.layout, title: { text: title, x: 0.01, xanchor: "left" }, paper_bgcolor: "#ffffff",
    plot_bgcolor: "#ffffff", margin: { ...plot.layout.margin, t: 60 },
  };
  const size = { width: Math.max(plot.clientWidth, 640), height: plot.clientHeight + 40 };
  const format = button.dataset.image;
  const url = await window.Plotly.toImage({ data: plot.data, layout }, { format, scale: 2, ...size });
  const link = document.createElement("a");
  link.href = url;
  link.download = frame.dataset.figure.replace(/[^\w.-]/g, "_") + "." + format;
  link.click();
});

// Enter in the field beside a slider means what leaving it means.
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.matches?.(".dash-range-slider-input")) event.target.blur();
});
